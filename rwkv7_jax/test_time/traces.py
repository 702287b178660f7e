"""Traces: completions to learn from, their files, their batches and the tokens they cost.

A completion is every id that was drawn, with the id that ended it: a student has to learn where to
stop.
"""

import dataclasses
import functools
import json
import math
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.checks import (
    check_count,
    check_ids,
    check_instance,
    check_number,
    check_prompts,
    check_tokens,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.jsonl import read_jsonl
from rwkv7_jax.data.records.fields import check_object
from rwkv7_jax.local_paths import local_path

Ids = tuple[int, ...]

# Ids that fit into int32; which vocabulary they are of is not known here.
_ANY_ID = 2**31


# The fields check themselves and take more than they become, so they are documentation here.
@typing.no_type_check
@dataclasses.dataclass(frozen=True)
class Trace:
    """A completion to learn from.

    Attributes:
        prompt: ids as the student sees them.
        completion: ids after it, with the one that ended it.
        weight: how much each of them counts; at least 0.
        source: the name of the model that wrote it.
    """

    prompt: Ids
    completion: Ids
    weight: float = 1.0
    source: str = ""

    def __post_init__(self):
        """Checks the fields; ids become tuples of int.

        Raises:
            TypeError: a field of the wrong kind.
            ValueError: no ids, a negative id, or a weight out of its range.
        """
        # The dataclass is frozen, so that traces can be keys of sets and dicts.
        object.__setattr__(self, "prompt", check_trace_ids(self.prompt, "prompt"))
        object.__setattr__(
            self, "completion", check_trace_ids(self.completion, "completion")
        )
        # True would become weight 1 without a word.
        if type(self.weight) is bool or not isinstance(
            self.weight, int | float | np.number
        ):
            kind = type(self.weight).__name__
            raise TypeError(f"Trace: `weight` must be a number; got {kind}.")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(
                f"Trace: `weight` must be finite and at least 0; got {self.weight}."
            )
        object.__setattr__(self, "weight", float(self.weight))
        if not isinstance(self.source, str):
            kind = type(self.source).__name__
            raise TypeError(f"Trace: `source` must be a string; got {kind}.")

    @property
    def inputs(self) -> int:
        """Inputs of a row that holds the trace; the last id is a target only."""
        return len(self.prompt) + len(self.completion) - 1


@dataclasses.dataclass(frozen=True)
class TokenBudget:
    """Tokens that a piece of work cost; budgets add up.

    Attributes:
        guide_tokens: read or drawn by a teacher; result files have this name.
        rollout_tokens: read or drawn by the student.
        gradient_tokens: inputs of the rows that a gradient went through, padding not counted.
    """

    guide_tokens: int = 0
    rollout_tokens: int = 0
    gradient_tokens: int = 0

    def __add__(self, other: "TokenBudget") -> "TokenBudget":
        """Adds two budgets."""
        return TokenBudget(
            guide_tokens=self.guide_tokens + other.guide_tokens,
            rollout_tokens=self.rollout_tokens + other.rollout_tokens,
            gradient_tokens=self.gradient_tokens + other.gradient_tokens,
        )

    def __str__(self) -> str:
        """Formats the budget on one line."""
        return (
            f"{self.guide_tokens:,} teacher, {self.rollout_tokens:,} rollout and "
            f"{self.gradient_tokens:,} gradient tokens"
        )


def check_trace_ids(values: Any, name: str) -> Ids:
    """Checks ids and returns them as a tuple of int."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
        raise TypeError(
            f"Trace: `{name}` must be a list of ids; got {type(values).__name__}."
        )
    # Not by truth: that of an array of several ids is undefined.
    if not len(values):
        raise ValueError(f"Trace: `{name}` must hold an id; got 0.")
    ids = []
    for value in values:
        # A bool is an int in Python, but `true` in a file is a mistake.
        is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not is_integer or not 0 <= value < _ANY_ID:
            raise ValueError(
                f"Trace: `{name}` must hold only integers of at least 0 and below {_ANY_ID:,}."
            )
        ids.append(int(value))
    return tuple(ids)


def write_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """Writes traces to a file, one JSON object a line; a file in the way is replaced at once.

    Raises:
        TypeError: something else than traces.
        ValueError: the file's folder does not exist.
    """
    with prefix_errors("write_traces"):
        path = local_path(path, "`path`")
        traces = list(traces)
        for trace in traces:
            check_instance(trace, Trace, "`traces`")
    with atomic_write(path) as file:
        for trace in traces:
            file.write(json.dumps(dataclasses.asdict(trace)).encode() + b"\n")


def read_traces(path: str | Path) -> list[Trace]:
    """Reads the traces of a file; `weight` and `source` may be missing.

    A last line that breaks off, as a killed writer leaves it, is dropped with a warning.

    Raises:
        ValueError: a line is not a trace; the message begins with `file:line`.
    """
    with prefix_errors("read_traces"):
        path = local_path(path, "`path`")
    return list(read_jsonl(path, _trace, drop_torn_end=True, allow_nan=True))


def _trace(record: Any) -> Trace:
    names = [field.name for field in dataclasses.fields(Trace)]
    for name in check_object(record):
        if name not in names:
            raise ValueError(f"unknown field {name!r}; a trace has {', '.join(names)}.")
    for name in ("prompt", "completion"):
        if name not in record:
            raise ValueError(f"`{name}` is missing.")
    try:
        # The constructor checks the kinds and ranges.
        return Trace(**record)
    except TypeError as error:
        raise ValueError(str(error)) from None


def completion_rows(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    length: int,
    weights: Sequence[float | int] | None = None,
) -> Batch:
    """Makes rows of a prompt, its completion and zeros; the mask is the weight of the completion.

    Args:
        prompts: none empty.
        completions: one for each prompt.
        length: inputs of a row (T).
        weights: one for each row; 1 by default.

    Returns:
        A batch of tokens [B T+1] int32 and mask [B T] float32.

    Raises:
        TypeError: ids that are not integers, or weights that are no numbers.
        ValueError: no rows, an empty prompt, other numbers of completions or weights, a weight out
            of its range, or a row that does not fit.
    """
    with prefix_errors("completion_rows"):
        check_count(length, 1, "`length`")
        _check_rows(prompts, completions, length, weights)
    # One token more than inputs: the last one is only a target.
    tokens = np.zeros((len(prompts), length + 1), np.int32)
    mask = np.zeros((len(prompts), length), np.float32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start = len(prompt)
        end = start + len(completion)
        tokens[row, :end] = [*prompt, *completion]
        # The target of position t is token t + 1, so the mask begins one place earlier.
        mask[row, start - 1 : end - 1] = 1.0 if weights is None else weights[row]
    return Batch(tokens=tokens, mask=mask)


def _check_rows(prompts: Any, completions: Any, length: int, weights: Any) -> None:
    """Raises unless prompts, completions and weights are rows of a length."""
    rows = check_prompts(prompts, _ANY_ID)
    columns = {"completions": completions}
    if weights is not None:
        columns["weights"] = weights
    for name, values in columns.items():
        if isinstance(values, str) or not hasattr(values, "__len__"):
            kind = type(values).__name__
            raise TypeError(f"`{name}` must be one for each prompt; got {kind}.")
        if len(values) != len(rows):
            raise ValueError(
                f"`{name}` must be one for each of {len(rows)} prompts; got {len(values)}."
            )
    for row, (prompt, completion) in enumerate(zip(rows, completions, strict=True)):
        written = len(check_ids(completion, _ANY_ID, f"`completions` row {row}"))
        # The last id is only a target.
        inputs = len(prompt) + written - 1
        if inputs > length:
            raise ValueError(
                f"`length` must be at least {inputs} for row {row} (a prompt of {len(prompt)} "
                f"ids and a completion of {written}); got {length}."
            )
    for weight in () if weights is None else weights:
        check_number(weight, 0, math.inf, "`weights`")


def check_traces(traces: Any) -> None:
    """Checks that there are traces, and that one of them counts.

    Raises:
        TypeError: no sequence, or something else in it.
        ValueError: there are none, or all have weight 0: there would be nothing to learn.
    """
    if isinstance(traces, str | bytes) or not isinstance(traces, Sequence):
        raise TypeError(
            f"`traces` must be a list of traces; got {type(traces).__name__}."
        )
    if not traces:
        raise ValueError("`traces` must hold a trace; got 0.")
    for trace in traces:
        check_instance(trace, Trace, "`traces`")
    if not any(trace.weight for trace in traces):
        raise ValueError("`traces` must hold one of a weight above 0; all have 0.")


def check_trace_tokens(traces: Sequence[Trace], vocab_size: int) -> None:
    """Checks traces, and that their ids are inside the vocabulary.

    Raises:
        TypeError: as `check_traces`.
        ValueError: as `check_traces`, or an id is out of range.
    """
    check_traces(traces)
    for trace in traces:
        check_tokens(np.array([*trace.prompt, *trace.completion]), vocab_size)


def longest_trace(traces: Sequence[Trace]) -> int:
    """Returns the inputs of the longest trace, the smallest `length` that holds them all.

    Raises:
        TypeError: something else than traces.
        ValueError: there are none, or none that counts.
    """
    with prefix_errors("longest_trace"):
        check_traces(traces)
    return max(trace.inputs for trace in traces)


# Steps of an epoch follow each other, so few orders are in use at the same time.
@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def trace_batch(
    traces: Sequence[Trace],
    step: int,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
) -> Batch:
    """Makes the batch of one step; its mask is each trace's weight at its completion.

    Every trace comes once before any comes again, in an order drawn from the seed and the epoch.
    Ids are not compared with a vocabulary: a training loop does so once.

    Args:
        traces: in a fixed order.
        step: from 0.
        batch_size: rows (B).
        length: inputs of a row (T); shorter rows are filled with zeros that do not count.
        seed: of the order.

    Returns:
        A batch of tokens [B T+1] int32 and mask [B T].

    Raises:
        ValueError: no traces, or one that does not fit.
    """
    with prefix_errors("trace_batch"):
        check_count(step, 0, "`step`")
        check_count(batch_size, 1, "`batch_size`")
        check_count(length, 1, "`length`")
        check_count(seed, 0, "`seed`")
        if not traces:
            raise ValueError("`traces` must hold a trace; got 0.")
        # Places of an endless sequence of epochs, so that any step can be made without the others.
        rows: list[Trace] = []
        for sample in range(step * batch_size, (step + 1) * batch_size):
            epoch, position = divmod(sample, len(traces))
            index = _order(seed, epoch, len(traces))[position]
            trace = traces[index]
            if trace.inputs > length:
                raise ValueError(
                    f"`length` must be at least {trace.inputs} for trace {index}; got {length}."
                )
            rows.append(trace)
    return completion_rows(
        [trace.prompt for trace in rows],
        [trace.completion for trace in rows],
        length=length,
        weights=[trace.weight for trace in rows],
    )


def gradient_tokens(batch: Batch) -> int:
    """Counts the inputs up to the last target of each row that counts: what a gradient costs."""
    with prefix_errors("gradient_tokens"):
        batch = Batch.of(batch, "mask")
    # Tokens after the last target do not reach the loss, so they need not be computed.
    counted = np.asarray(batch.mask) > 0
    last = counted.shape[1] - np.argmax(counted[:, ::-1], axis=1)
    return int(np.sum(np.where(counted.any(1), last, 0)))
