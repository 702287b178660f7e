"""Traces (completions to learn from): their files, their batches and their cost in tokens.

A completion includes its stop id, because a student has to learn where to stop.
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
    as_float,
    check_count,
    check_ids,
    check_instance,
    check_number,
    check_prompts,
    is_real_number,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.data.jsonl import read_jsonl
from rwkv7_jax.data.records.fields import check_object
from rwkv7_jax.local_paths import local_path
from rwkv7_jax.training.losses import target_weights

Ids = tuple[int, ...]

# Ids must fit into int32; the vocabulary is unknown here.
_ANY_ID = 2**31


# `__post_init__` checks the fields and accepts more types than the annotations.
@typing.no_type_check
@dataclasses.dataclass(frozen=True)
class Trace:
    """A completion to learn from.

    Attributes:
        prompt: ids that the student sees.
        completion: ids of the completion, including the stop id.
        weight: weight of each of these ids in the loss; at least 0.
        source: name of the model that wrote it.
    """

    prompt: Ids
    completion: Ids
    weight: float = 1.0
    source: str = ""

    def __post_init__(self):
        """Checks the fields; ids become tuples of int.

        Raises:
            TypeError: a field has the wrong type.
            ValueError: there are no ids, an id is negative, or the weight is out of range.
        """
        # The dataclass is frozen, so traces can be members of sets and keys of dicts.
        object.__setattr__(self, "prompt", check_trace_ids(self.prompt, "prompt"))
        object.__setattr__(
            self, "completion", check_trace_ids(self.completion, "completion")
        )
        # True must not silently become weight 1.
        is_bool = isinstance(self.weight, bool | np.bool_)
        if is_bool or not is_real_number(self.weight):
            kind = type(self.weight).__name__
            raise TypeError(f"Trace: `weight` must be a number; got {kind}.")
        weight = as_float(self.weight)
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"Trace: `weight` must be finite and at least 0; got {weight}."
            )
        object.__setattr__(self, "weight", weight)
        check_instance(self.source, str, "Trace: `source`")

    @property
    def inputs(self) -> int:
        """The number of inputs of the trace's row; the last id is only a target."""
        return len(self.prompt) + len(self.completion) - 1


@dataclasses.dataclass(frozen=True)
class TokenBudget:
    """Numbers of processed tokens, which add up.

    Attributes:
        guide_tokens: tokens read or sampled by a teacher; result files use this name.
        rollout_tokens: tokens read or sampled by the student.
        gradient_tokens: inputs with a backward pass, without padding.
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
    # The truth value of an array of several ids is undefined.
    if not len(values):
        raise ValueError(f"Trace: `{name}` must hold at least one id; got none.")
    ids = []
    for value in values:
        # bool is a subclass of int, but `true` in a file is a mistake.
        is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not is_integer or not 0 <= value < _ANY_ID:
            raise ValueError(
                f"Trace: `{name}` must hold only integers of at least 0 and below {_ANY_ID:,}."
            )
        ids.append(int(value))
    return tuple(ids)


def write_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """Writes traces to a file, one JSON object per line; atomically replaces an existing file.

    Raises:
        TypeError: `traces` holds something other than a `Trace`.
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

    An incomplete last line, as a killed writer leaves it, is dropped with a warning.

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
            raise ValueError(
                f"a trace must have only the fields {', '.join(names)}; got {name!r}."
            )
    for name in ("prompt", "completion"):
        if name not in record:
            raise ValueError(f"a trace must have the field {name!r}.")
    try:
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
    """Makes rows of a prompt, its completion and zeros, with the weight on completion targets.

    Args:
        prompts: non-empty prompts.
        completions: one completion per prompt.
        length: inputs of a row (T).
        weights: one weight per row; 1 by default.

    Returns:
        A batch of tokens [B T+1] int32 and mask [B T] float32.

    Raises:
        TypeError: an id is not an integer, or a weight is not a number.
        ValueError: there are no rows, a prompt is empty, the numbers of completions or weights
            differ from that of prompts, a weight is out of range, or a row does not fit.
    """
    with prefix_errors("completion_rows"):
        check_count(length, 1, "`length`")
        _check_rows(prompts, completions, length, weights)
    # One token more than inputs, because the last one is only a target.
    tokens = np.zeros((len(prompts), length + 1), np.int32)
    mask = np.zeros((len(prompts), length), np.float32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start = len(prompt)
        end = start + len(completion)
        tokens[row, :end] = [*prompt, *completion]
        # The target of position t is token t + 1, so the mask begins one position earlier.
        mask[row, start - 1 : end - 1] = 1.0 if weights is None else weights[row]
    return Batch(tokens=tokens, mask=mask)


def _check_rows(prompts: Any, completions: Any, length: int, weights: Any) -> None:
    """Raises unless prompts, completions and weights match and fit into rows of `length`."""
    rows = check_prompts(prompts, _ANY_ID)
    columns = {"completions": completions}
    if weights is not None:
        columns["weights"] = weights
    for name, values in columns.items():
        if isinstance(values, str) or not hasattr(values, "__len__"):
            kind = type(values).__name__
            raise TypeError(
                f"`{name}` must be a list with one entry per prompt; got {kind}."
            )
        if len(values) != len(rows):
            raise ValueError(
                f"`{name}` must have one entry for each of {len(rows)} prompts; got {len(values)}."
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
    """Checks that there are traces, and that at least one has a weight.

    Raises:
        TypeError: `traces` is not a sequence of traces.
        ValueError: there are no traces, or all have weight 0.
    """
    if isinstance(traces, str | bytes) or not isinstance(traces, Sequence):
        raise TypeError(
            f"`traces` must be a list of traces; got {type(traces).__name__}."
        )
    if not traces:
        raise ValueError("`traces` must hold at least one trace; got none.")
    for trace in traces:
        check_instance(trace, Trace, "`traces`")
    if not any(trace.weight for trace in traces):
        raise ValueError(
            "`traces` must hold a trace with a weight above 0; all have 0."
        )


def check_trace_tokens(traces: Sequence[Trace], vocab_size: int) -> None:
    """Checks traces, and that their ids are in the vocabulary.

    Raises:
        TypeError: as `check_traces`.
        ValueError: as `check_traces`, or an id is out of range.
    """
    check_traces(traces)
    for index, trace in enumerate(traces):
        check_ids([*trace.prompt, *trace.completion], vocab_size, f"`traces[{index}]`")


def longest_trace(traces: Sequence[Trace]) -> int:
    """Returns the inputs of the longest trace: the smallest `length` that fits all traces.

    Raises:
        TypeError: `traces` is not a sequence of traces.
        ValueError: there are no traces, or all have weight 0.
    """
    with prefix_errors("longest_trace"):
        check_traces(traces)
    return max(trace.inputs for trace in traces)


# Steps are consecutive, so few orders are in use at the same time.
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
    """Makes the batch of one step; its mask is each trace's weight on its completion.

    Every trace comes once per epoch, in an order that depends on the seed and the epoch. Ids are
    not checked against a vocabulary: a training loop checks them once.

    Args:
        traces: traces in a fixed order.
        step: index of the step, from 0.
        batch_size: rows (B).
        length: inputs of a row (T); shorter rows are padded with zeros that do not count.
        seed: seed of the order.

    Returns:
        A batch of tokens [B T+1] int32 and mask [B T].

    Raises:
        ValueError: there are no traces, or a trace is longer than `length`.
    """
    with prefix_errors("trace_batch"):
        check_count(step, 0, "`step`")
        check_count(batch_size, 1, "`batch_size`")
        check_count(length, 1, "`length`")
        check_count(seed, 0, "`seed`")
        if not traces:
            raise ValueError("`traces` must hold at least one trace; got none.")
        # Indices into an endless sequence of epochs, so that no step depends on earlier ones.
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


def gradient_tokens(batch: BatchLike) -> int:
    """Counts the inputs with a gradient: those up to the last target of each row that counts.

    Args:
        batch: with a mask or, as in a loss, `weights` in its place.

    Raises:
        TypeError: not a batch.
        ValueError: neither a mask nor weights.
    """
    with prefix_errors("gradient_tokens"):
        batch = Batch.of(batch)
        weights = target_weights(batch)
        if weights is None:
            raise ValueError(
                f"`batch` must hold 'mask' or 'weights'; it has {', '.join(batch)}."
            )
    counted = np.asarray(weights) != 0
    last = counted.shape[1] - np.argmax(counted[:, ::-1], axis=1)
    return int(np.sum(np.where(counted.any(1), last, 0)))
