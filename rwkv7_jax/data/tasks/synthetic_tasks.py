"""Synthetic tasks as batches of questions and scored answers.

Some are lines of text such as `copy kqz = kqz`, in which the answer and the line end count; the
others are from `toy_tasks`. All use the ids of single bytes (byte + 1), which are the same in World
and in the byte vocabulary, so that every model can read them.
"""

import dataclasses
import difflib
import functools
import warnings
from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from rwkv7_jax.checks import check_count, check_instance, prefix_errors
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.tasks import toy_tasks as toy

# A question and its answer.
Example = tuple[str, str]

# Ids of several texts of different lengths.
IdLists = list[list[int]]

_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


def _copy(rng: Generator) -> Example:
    size = rng.integers(3, 13)
    word = "".join(rng.choice(_LETTERS, size))
    return f"copy {word} = ", word


def _recall(rng: Generator) -> Example:
    """Builds associative recall: some pairs, then the value of one key."""
    letters = rng.permutation(_LETTERS)
    keys = letters[: rng.integers(2, 9)]
    values = rng.integers(0, 10, len(keys))
    pairs = [f"{key}{value}" for key, value in zip(keys, values, strict=True)]
    queried = rng.integers(len(keys))
    return f"recall {' '.join(pairs)} {keys[queried]} = ", str(values[queried])


def _parity(rng: Generator) -> Example:
    size = rng.integers(1, 25)
    bits = rng.integers(0, 2, size)
    return f"parity {''.join(map(str, bits))} = ", str(bits.sum() % 2)


def _summand(rng: Generator) -> int:
    """Draws a number below 10**d for a random d from 1 to 4."""
    digits = rng.integers(1, 5)
    return int(rng.integers(10**digits))


def _addition(rng: Generator) -> Example:
    first = _summand(rng)
    second = _summand(rng)
    return f"add {first} {second} = ", str(first + second)


def _lines(
    rng: Generator,
    rows: int,
    length: int,
    *,
    example: Callable,
) -> toy.Rows:
    """Builds rows of token 0 followed by lines, truncated at the end, and scores the answers."""
    tokens = []
    scored = []
    for _ in range(rows):
        ids = [0]
        counts = [0]
        while len(ids) <= length:
            question, answer = example(rng)
            line = f"{question}{answer}\n".encode()
            ids += [byte + 1 for byte in line]
            # Questions are ASCII, so bytes equal characters. The line end is scored too.
            counts += [0] * len(question)
            counts += [1] * (len(line) - len(question))
        tokens.append(ids[: length + 1])
        scored.append(counts[: length + 1])
    return np.array(tokens, np.int64), np.array(scored, np.int64)


@dataclasses.dataclass(frozen=True)
class Task:
    """A synthetic task.

    Attributes:
        rows: builds rows: (rng, rows, length) -> ids and the mask of scored ids, both
            [rows, length + 1].
        shortest: number of inputs (T) that suffices for one example.
        exact: whether a row's first question has one right answer.
    """

    rows: Callable[[Generator, int, int], toy.Rows]
    shortest: int
    exact: bool = True


def _line(example: Callable, longest: int) -> Task:
    """Builds a task of lines, whose rows must have room for the longest line."""
    return Task(functools.partial(_lines, example=example), longest)


def _sequence(letter: bytes, change: toy.Change) -> Task:
    rows = functools.partial(toy.one_sequence, letter=letter, change=change)
    return Task(rows, 13)


def _next_of_reversed(symbols: np.ndarray) -> np.ndarray:
    return toy.next_symbol(toy.reversed_symbols(symbols))


TASKS: dict[str, Task] = {
    "copy": _line(_copy, 33),
    "recall": _line(_recall, 38),
    "parity": _line(_parity, 36),
    "addition": _line(_addition, 23),
    "dictionary": Task(toy.dictionary, 6, exact=False),
    "mapping": Task(toy.mapping, 4, exact=False),
    "modular": Task(toy.modular, 5),
    "sequence": Task(toy.sequence, 13, exact=False),
    "mixture": Task(toy.mixture, 13, exact=False),
    "reverse": _sequence(b"R", toy.reversed_symbols),
    "steer": _sequence(b"?", toy.reversed_symbols),
    "novel": _sequence(b"?", _next_of_reversed),
    "pairs": Task(toy.pairs, 5),
}

# Names in older settings. The task was never the published one of that name.
_FORMER_NAMES = {"mqar": "pairs"}


def _by_modulus(
    number: int, seed: int, *, letter: bytes, operation: toy.Operation
) -> Task:
    rows = functools.partial(
        toy.one_modulus, modulus=number, letter=letter, operation=operation
    )
    return Task(rows, 5)


_MODULUS = functools.partial(_by_modulus, letter=b"A", operation=np.add)

_PRODUCT = functools.partial(_by_modulus, letter=b"P", operation=np.multiply)


def _facts(number: int, seed: int) -> Task:
    rows = functools.partial(toy.facts, count=number, seed=seed)
    return Task(rows, 3)


def _swaps(number: int, seed: int) -> Task:
    rows = functools.partial(toy.swaps, objects=number)
    return Task(rows, number + 3)


# A function from (number, seed) to the task, and the smallest and largest number.
Family = tuple[Callable[[int, int], Task], int, int]

# Tasks whose name ends with a number.
FAMILIES: dict[str, Family] = {
    "modulus": (_MODULUS, 2, len(toy.SYMBOLS) - 1),
    "product": (_PRODUCT, 2, len(toy.SYMBOLS) - 1),
    "facts": (_facts, 1, toy.KEYS),
    "swaps": (_swaps, 2, len(toy.SYMBOLS)),
}


def _unknown_name(name: str) -> str:
    """Builds the error message for an unknown name."""
    nearest = difflib.get_close_matches(
        name.split("-")[0],
        [*TASKS, *FAMILIES],
        n=1,
        cutoff=0.6,
    )
    hint = f" (the nearest is {nearest[0]})" if nearest else ""
    names = list(TASKS)
    for family, (_, low, high) in FAMILIES.items():
        names.append(f"{family}-{low} to {family}-{high}")
    return f"`name` must be one of {', '.join(names)}; got {name!r}{hint}."


def find_task(name: str, *, seed: int = 0) -> Task:
    """Returns the task with that name; `seed` determines the facts of "facts-F".

    Raises:
        TypeError: the name is not a string.
        ValueError: the name is unknown, or its number is out of range.
    """
    with prefix_errors("find_task"):
        check_instance(name, str, "`name`")
    if name in _FORMER_NAMES:
        warnings.warn(
            f"find_task: {name} is now called {_FORMER_NAMES[name]}; its rows are the same.",
            stacklevel=2,
        )
        name = _FORMER_NAMES[name]
    if name in TASKS:
        return TASKS[name]
    family, _, number = name.partition("-")
    if family in FAMILIES:
        make, low, high = FAMILIES[family]
        # Each task has one spelling: "modulus-09" is rejected.
        is_plain = number.isascii() and number.isdigit() and number[0] != "0"
        # Python cannot parse numbers with thousands of digits.
        if is_plain and len(number) <= len(str(high)) and low <= int(number) <= high:
            return make(int(number), seed)
    with prefix_errors("find_task"):
        raise ValueError(_unknown_name(name))


def _check_numbers(step: int, batch_size: int, seed: int) -> None:
    """Checks the numbers that select a batch.

    Raises:
        TypeError: a number is not an integer.
        ValueError: the step or the seed is negative, or the batch has no row.
    """
    check_count(step, 0, "`step`")
    check_count(batch_size, 1, "`batch_size`")
    check_count(seed, 0, "`seed`")


def task_batch(
    name: str,
    step: int,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    held_out: bool = False,
) -> Batch:
    """Builds the batch of one step: tokens [B T+1] int32; mask [B T], 1 at targets in answers.

    Rows are padded with zeros, which do not count, if no further example fits.

    Args:
        name: a name in `TASKS`, or one in `FAMILIES` with a number, such as "facts-256".
        step: the step, from 0.
        batch_size: number of rows (B).
        length: number of inputs per row (T).
        seed: seed of the examples, together with the step. Facts depend only on the seed.
        held_out: draw from a separate stream of examples; facts are the same.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the task is unknown, a number is out of range, or rows are too short for one
            example.
    """
    with prefix_errors("task_batch"):
        _check_numbers(step, batch_size, seed)
        check_count(length, 1, "`length`")
        task = find_task(name, seed=seed)
    if length < task.shortest:
        raise ValueError(
            f"task_batch: `length` must be at least {task.shortest} for {name}; got {length}."
        )
    rng = np.random.default_rng([seed, step, held_out])
    tokens, scored = task.rows(rng, batch_size, length)
    # The first id of a row is not a target.
    mask = scored[:, 1:]
    return Batch(
        tokens=tokens.astype(np.int32),
        mask=mask.astype(np.float32),
    )


def question_batch(
    name: str,
    step: int,
    *,
    batch_size: int,
    length: int | None = None,
    seed: int = 0,
    held_out: bool = False,
) -> tuple[IdLists, IdLists]:
    """Builds single questions and their exact answers, as lists of ids to compare with completions.

    Answers of line tasks include the line end. The questions depend only on the arguments.

    Args:
        name: name of a task whose questions have one right answer.
        step: the step, from 0.
        batch_size: number of questions.
        length: length of the rows whose first questions these are, which can make them harder
            (swaps, pairs); None for the shortest.
        seed: as in `task_batch`.
        held_out: draw from a separate stream of questions.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the task is unknown, a number is out of range, or its answers depend on earlier
            examples.
    """
    with prefix_errors("question_batch"):
        _check_numbers(step, batch_size, seed)
        if length is not None:
            check_count(length, 1, "`length`")
        task = find_task(name, seed=seed)
    if not task.exact:
        raise ValueError(
            "question_batch: `name` must be a task whose questions have one right answer; got "
            f"{name}."
        )
    # The fourth number separates questions from the examples of `task_batch`.
    rng = np.random.default_rng([seed, step, held_out, 1])
    # A family's shortest row may be longer than the requested length.
    length = max(length or 0, task.shortest)
    tokens, scored = task.rows(rng, batch_size, length)
    questions = []
    answers = []
    for ids, counts in zip(tokens.tolist(), scored.tolist(), strict=True):
        begin = counts.index(1)
        # The appended zero ends the search if the answer ends the row.
        end = [*counts, 0].index(0, begin)
        questions.append(ids[:begin])
        answers.append(ids[begin:end])
    return questions, answers
