"""What a model wrote behind prompts: records, their files, their batches, what they cost.

A completion is every id that was drawn, the id that ended it included: a student shall learn where
to stop.
"""

import dataclasses
import functools
import json
import math
import typing
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.checks import check_count
from rwkv7_jax.data.batch import Batch

Ids = tuple[int, ...]


# The fields check themselves and take more than they become, so they are documentation here.
@typing.no_type_check
@dataclasses.dataclass(frozen=True)
class Trace:
    """A completion to learn from.

    Attributes:
        prompt: ids as the student shall see them.
        completion: ids behind it, the one that ended it included.
        weight: how much each of them counts; at least 0.
        source: who wrote it.
    """

    prompt: Ids
    completion: Ids
    weight: float = 1.0
    source: str = ""

    def __post_init__(self):
        """Return if the fields are what they shall be; ids become tuples of int."""
        for name in ("prompt", "completion"):
            object.__setattr__(self, name, _ids(getattr(self, name), name))
        if type(self.weight) is bool or not isinstance(self.weight, int | float | np.number):
            kind = type(self.weight).__name__
            raise TypeError(f"Trace: `weight` must be a number; got {kind}.")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"Trace: `weight` must be finite and at least 0; got {self.weight}.")
        object.__setattr__(self, "weight", float(self.weight))
        if not isinstance(self.source, str):
            kind = type(self.source).__name__
            raise TypeError(f"Trace: `source` must be a string; got {kind}.")


@dataclasses.dataclass(frozen=True)
class TokenBudget:
    """Tokens that something cost; budgets add up.

    Attributes:
        guide_tokens: read or drawn by a guide.
        rollout_tokens: read or drawn by the student.
        gradient_tokens: inputs of the rows that a gradient went through, padding not counted.
    """

    guide_tokens: int = 0
    rollout_tokens: int = 0
    gradient_tokens: int = 0

    def __add__(self, other: "TokenBudget") -> "TokenBudget":
        """Both together."""
        names = [field.name for field in dataclasses.fields(self)]
        return TokenBudget(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.guide_tokens:,} guide, {self.rollout_tokens:,} rollout and "
            f"{self.gradient_tokens:,} gradient tokens"
        )


def _ids(values: Any, name: str) -> Ids:
    """The ids as a tuple of int."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
        raise TypeError(f"Trace: `{name}` must be a list of ids; got {type(values).__name__}.")
    if not len(values):
        raise ValueError(f"Trace: `{name}` must hold an id; got 0.")
    if any(isinstance(v, bool) or not isinstance(v, int | np.integer) or v < 0 for v in values):
        raise ValueError(f"Trace: `{name}` must hold integers of at least 0 alone.")
    return tuple(int(v) for v in values)


def write_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """The file holds these traces, one JSON object a line, or is what it was before.

    Raises:
        ValueError: the file's folder does not exist.
    """
    with atomic_write(Path(path)) as file:
        for trace in traces:
            file.write(json.dumps(dataclasses.asdict(trace)).encode() + b"\n")


def read_traces(path: str | Path) -> list[Trace]:
    """The traces of a file; `weight` and `source` may be missing.

    A last line that breaks off, as a killed writer leaves it, is dropped with a warning.

    Raises:
        ValueError: a line is no trace; the message begins with `file:line`.
    """
    return [_trace(fields, f"{path}:{number}") for number, fields in _objects(Path(path))]


def _trace(fields: dict, place: str) -> Trace:
    names = [field.name for field in dataclasses.fields(Trace)]
    for name in fields:
        if name not in names:
            raise ValueError(f"{place}: unknown field {name!r}; a trace has {', '.join(names)}.")
    for name in ("prompt", "completion"):
        if name not in fields:
            raise ValueError(f"{place}: `{name}` is missing.")
    try:
        return Trace(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None


def _objects(path: Path) -> Iterator[tuple[int, dict]]:
    """The objects of a JSONL file and their lines' numbers; a last half line is dropped."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                warnings.warn(f"{path}:{number}: dropped; the line breaks off.", stacklevel=3)
                return
            raise ValueError(f"{path}:{number}: no JSON: {error}.") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path}:{number}: must be an object; got {type(fields).__name__}.")
        yield number, fields


def completion_rows(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    length: int,
    weights: Sequence[float | int] | None = None,
    caller: str = "completion_rows",
) -> Batch:
    """Rows of a prompt, its completion and zeros; the mask is the weight at completions' targets.

    Args:
        prompts: none empty.
        completions: one a prompt.
        length: inputs of a row (T).
        weights: one a row; 1 by default.
        caller: the public function's name, for messages.

    Returns:
        tokens [B T+1] int32 and mask [B T] float32.

    Raises:
        ValueError: a row does not fit.
    """
    tokens = np.zeros((len(prompts), length + 1), np.int32)
    mask = np.zeros((len(prompts), length), np.float32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        begin, end = len(prompt), len(prompt) + len(completion)
        if end > length + 1:
            raise ValueError(
                f"{caller}: `length` must be at least {end - 1} for row {row} (a prompt of {begin} "
                f"ids and a completion of {len(completion)}); got {length}."
            )
        tokens[row, :end] = [*prompt, *completion]
        mask[row, begin - 1 : end - 1] = 1.0 if weights is None else weights[row]
    return Batch(tokens=tokens, mask=mask)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def trace_batch(
    traces: Sequence[Trace], step: int, *, batch_size: int, length: int, seed: int = 0
) -> Batch:
    """The batch of one step: tokens [B T+1] int32, mask [B T], a trace's weight at its completion.

    Every trace comes once before any comes again, in an order drawn from the seed and the epoch.
    Ids are not compared with a vocabulary; whoever trains on them does so once.

    Args:
        traces: in a fixed order.
        step: from 0.
        batch_size: rows (B).
        length: inputs of a row (T); shorter rows are filled with zeros that do not count.
        seed: of the order.

    Raises:
        ValueError: no traces, or one that does not fit.
    """
    for name, value, least in (("step", step, 0), ("batch_size", batch_size, 1)):
        check_count(value, least, f"trace_batch: `{name}`")
    check_count(length, 1, "trace_batch: `length`")
    if not traces:
        raise ValueError("trace_batch: `traces` must hold a trace; got 0.")
    places = range(step * batch_size, (step + 1) * batch_size)
    picked = [_order(seed, i // len(traces), len(traces))[i % len(traces)] for i in places]
    for index in picked:
        trace = traces[index]
        if (least := len(trace.prompt) + len(trace.completion) - 1) > length:
            raise ValueError(
                f"trace_batch: `length` must be at least {least} for trace {index}; got {length}."
            )
    rows = [traces[index] for index in picked]
    return completion_rows(
        [trace.prompt for trace in rows],
        [trace.completion for trace in rows],
        length=length,
        weights=[trace.weight for trace in rows],
    )


def gradient_tokens(batch: Batch) -> int:
    """Inputs up to the last target of each row that counts: what a gradient costs."""
    counted = np.asarray(batch.mask) > 0
    last = counted.shape[1] - np.argmax(counted[:, ::-1], axis=1)
    return int(np.sum(np.where(counted.any(1), last, 0)))
