"""In which order a run reads its data: pure functions of a sample's number."""

import functools
import math
from collections.abc import Iterable

import numpy as np

ORDERS = ("shuffled", "cubic")


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, count: int, length: int) -> tuple[int, np.ndarray]:
    """Where an epoch's first window begins, and the order in which its windows come."""
    rng = np.random.default_rng([seed, epoch])
    phase = int(rng.integers(length))
    # In place, in the narrowest type that fits: the table of 10^9 windows takes 4 GB.
    order = np.arange(count, dtype=np.uint32 if count < 2**32 else np.uint64)
    rng.shuffle(order)
    return phase, order


def shuffled(samples: Iterable[int], *, seed: int, count: int) -> list[int]:
    """Which of `count` things each sample is: all come once an epoch, drawn from (seed, epoch)."""
    return [int(_epoch(seed, i // count, count, 1)[1][i % count]) for i in samples]


def shuffled_windows(
    samples: Iterable[int], *, seed: int, tokens: int, length: int, caller: str
) -> list[int]:
    """Where each sample's window begins: all windows come once an epoch.

    Their borders move from epoch to epoch.

    Raises:
        ValueError: the stream is shorter than two windows.
    """
    count = (tokens - length) // length
    if count < 1:
        raise ValueError(
            f"{caller}: `stream` must have at least {2 * length} tokens; got {tokens}."
        )
    epochs = [(_epoch(seed, i // count, count, length), i % count) for i in samples]
    return [phase + int(order[place]) * length for (phase, order), place in epochs]


def is_prime(number: int) -> bool:
    """Whether a number below 10^18 is prime."""
    if number < 4:
        return number > 1
    divisors = np.arange(3, math.isqrt(number) + 1, 2)
    return bool(number % 2 and (number % divisors).all())


@functools.lru_cache(maxsize=16)
def magic_prime(tokens: int, length: int) -> int:
    """The largest prime p with p % 3 == 2 that is at most tokens // length - 1.

    Cubing permutes the numbers modulo such a prime.

    Source: BlinkDL/RWKV-LM@1abbde7 RWKV-v5/make_data.py:124-131.

    Raises:
        ValueError: the stream is shorter than three windows, where there is none.
    """
    for number in range(tokens // length - 1, 1, -1):
        if number % 3 == 2 and is_prime(number):
            return number
    raise ValueError(
        f"magic_prime: `tokens` must be at least {3 * length} for windows of {length}; "
        f"got {tokens}."
    )


def cubic_windows(samples: Iterable[int], *, tokens: int, length: int) -> list[int]:
    """Where each sample's window begins in the order of RWKV's own trainer; there is no seed.

    Of every p samples in a row each of the first p windows is one, p being `magic_prime`; the order
    is the same in every epoch.

    Source: BlinkDL/RWKV-LM@d07df1c RWKV-v7/train_temp/src/dataset.py:49-61.

    Raises:
        ValueError: the stream is shorter than three windows.
    """
    prime = magic_prime(tokens, length)
    factor = int(prime * ((math.sqrt(5) - 1) / 2))
    # Python's integers: a cube soon leaves 64 bits.
    return [factor * (i + 1) ** 3 % prime * length for i in samples]
