"""The order in which a run reads its data, as pure functions of the sample index."""

import functools
import math
from collections.abc import Iterable

import numpy as np


# Caches several orders: a batch may reach into the next epoch, and an anchor has its own seed.
@functools.lru_cache(maxsize=4)
def _epoch(
    seed: int,
    epoch: int,
    count: int,
    length: int,
) -> tuple[int, np.ndarray]:
    """Draws the start of an epoch's first window, and the order of its windows."""
    rng = np.random.default_rng([seed, epoch])
    phase = int(rng.integers(length))
    # Shuffled in place in the narrowest dtype: the order of 10^9 windows takes 4 GB.
    dtype = np.uint32 if count < 2**32 else np.uint64
    order = np.arange(count, dtype=dtype)
    rng.shuffle(order)
    return phase, order


def shuffled(
    samples: Iterable[int],
    *,
    seed: int,
    count: int,
) -> list[int]:
    """Picks one of `count` items for each sample; each item comes once per epoch.

    Args:
        samples: sample indices, from 0.
        seed: the order depends only on it and the epoch.
        count: number of items.
    """
    picked = []
    for sample in samples:
        epoch, place = divmod(sample, count)
        _, order = _epoch(seed, epoch, count, 1)
        picked.append(int(order[place]))
    return picked


def shuffled_windows(
    samples: Iterable[int],
    *,
    seed: int,
    tokens: int,
    length: int,
) -> list[int]:
    """Computes the start of each sample's window; each window comes once per epoch.

    The windows' borders shift between epochs, so that no token is always the last of a row. The
    stream must have at least two windows.
    """
    # One window fewer than would fit, because the phase shifts them by up to `length` - 1.
    count = (tokens - length) // length
    firsts = []
    for sample in samples:
        epoch, place = divmod(sample, count)
        phase, order = _epoch(seed, epoch, count, length)
        firsts.append(phase + int(order[place]) * length)
    return firsts


def is_prime(number: int) -> bool:
    """Returns whether a number below 10^18 is prime, by trial division."""
    if number < 4:
        return number > 1
    if number % 2 == 0:
        return False
    odd = np.arange(3, math.isqrt(number) + 1, 2)
    return bool((number % odd).all())


@functools.lru_cache(maxsize=16)
def magic_prime(tokens: int, length: int) -> int:
    """Finds the largest prime p with p % 3 == 2 that is at most tokens // length - 1.

    Cubing permutes the numbers modulo such a prime. The stream must have at least three windows.

    Source: BlinkDL/RWKV-LM@1abbde7 RWKV-v5/make_data.py:124-131.
    """
    numbers = range(tokens // length - 1, 1, -1)
    return next(number for number in numbers if number % 3 == 2 and is_prime(number))


def cubic_windows(
    samples: Iterable[int],
    *,
    tokens: int,
    length: int,
) -> list[int]:
    """Computes the start of each sample's window in the order of RWKV's own trainer.

    There is no seed, and the order is the same in every epoch. Any p consecutive samples cover the
    first p windows, where p is `magic_prime`.

    Source: BlinkDL/RWKV-LM@d07df1c RWKV-v7/train_temp/src/dataset.py:49-61.
    """
    prime = magic_prime(tokens, length)
    golden = (math.sqrt(5) - 1) / 2
    factor = int(prime * golden)
    # Python integers, because a cube soon exceeds 64 bits.
    return [factor * (sample + 1) ** 3 % prime * length for sample in samples]
