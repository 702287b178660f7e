"""Synthetic tasks as batches: questions to read, answers to be scored. Level 1.

Examples are lines of ASCII such as `copy kqz = kqz`, in the ids that single bytes have in both
vocabularies (byte + 1), so that every model can read them. Only answers and the line's end count.
"""

from collections.abc import Callable

import numpy as np

Example = tuple[str, str]
_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


def _copy(rng: np.random.Generator) -> Example:
    word = "".join(rng.choice(_LETTERS, rng.integers(3, 13)))
    return f"copy {word} = ", word


def _recall(rng: np.random.Generator) -> Example:
    """Multi-query associative recall: some pairs, then the value of one key."""
    keys = rng.permutation(_LETTERS)[: rng.integers(2, 9)]
    values = rng.integers(0, 10, len(keys))
    pairs = " ".join(f"{key}{value}" for key, value in zip(keys, values, strict=True))
    asked = rng.integers(len(keys))
    return f"recall {pairs} {keys[asked]} = ", str(values[asked])


def _parity(rng: np.random.Generator) -> Example:
    bits = rng.integers(0, 2, rng.integers(1, 25))
    return f"parity {''.join(map(str, bits))} = ", str(bits.sum() % 2)


def _addition(rng: np.random.Generator) -> Example:
    one, two = (int(rng.integers(10 ** rng.integers(1, 5))) for _ in range(2))
    return f"add {one} {two} = ", str(one + two)


TASKS: dict[str, Callable[[np.random.Generator], Example]] = {
    "copy": _copy,
    "recall": _recall,
    "parity": _parity,
    "addition": _addition,
}


def _row(task: Callable, rng: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
    """Token 0 and then examples, cut at `length`; and which ids belong to an answer."""
    ids, scored = [0], [0]
    while len(ids) < length:
        question, answer = (part.encode() for part in task(rng))
        line = question + answer + b"\n"
        ids += [byte + 1 for byte in line]
        scored += [0] * len(question) + [1] * (len(answer) + 1)
    return ids[:length], scored[:length]


def task_batch(
    name: str, step: int, *, batch_size: int, length: int, seed: int = 0, held_out: bool = False
) -> dict[str, np.ndarray]:
    """The batch of one step: tokens [B T+1] int32, mask [B T], 1 where the target is an answer's.

    Args:
        name: of `TASKS`.
        step: from 0.
        batch_size: rows (B).
        length: inputs of a row (T).
        seed: with the step, all that the batch depends on.
        held_out: draw from a stream of examples of its own.

    Raises:
        ValueError: no task of that name.
    """
    if name not in TASKS:
        raise ValueError(f"task_batch: `name` must be one of {', '.join(TASKS)}; got {name!r}.")
    rng = np.random.default_rng([seed, step, held_out])
    rows = [_row(TASKS[name], rng, length + 1) for _ in range(batch_size)]
    tokens, scored = (np.array(part) for part in zip(*rows, strict=True))
    return {"tokens": tokens.astype(np.int32), "mask": scored[:, 1:].astype(np.float32)}
