"""What a run is told, as frozen dataclasses that refuse what they do not know. Level 2."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from .config import RWKV7Config
from .setting_groups import (
    Data,
    Decorrelation,
    Evaluation,
    Observing,
    Optimizer,
    Sample,
    StateTuning,
    TestTime,
    Upscaling,
)

_CHOICES = (
    ("data", "on_bad", ("error", "skip")),
    ("data", "packing", ("stream", "documents")),
    ("data", "order", ("shuffled", "cubic")),
    ("tuning", "leaves", ("wkv", "all")),
    ("tuning", "decorrelate", ("none", "dbp", "whiten")),
    ("test_time", "method", ("grpo", "distil", "expert", "context")),
    ("test_time", "keep", ("verified", "majority", "all")),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run, whole.

    Attributes:
        mode: "pretrain", "state", "upscaled_state", "observer" or "test_time".
        init: checkpoint to start from; empty for a new model of `model`'s sizes.
        state: tuned start states for eval.py, several with commas.
        model: fields of `RWKV7Config` for a new model, or changes (dtype, remat, implementation) to
            `init`.
        steps: updates.
        seed: of initialisation and data order.
        log_every: steps between two lines of the log.
        save_every: steps between two checkpoints; 0 for one at the end alone.
        keep: newest checkpoints kept.
        keep_every: checkpoints of multiples of this are kept for good; 0 for none.
        keep_best: checkpoints kept because they measured best; evaluations save them.
        stop_after_bad: updates in a row with a loss or gradient that is not finite, all of them
            left out, at which the run stops; 0 for never.
        allow_nan: take a checkpoint that holds NaN or Inf.
        profile_steps: "first:last", steps of which a profile is written; empty for none.
        trackers: where numbers go beside the run's files: "tensorboard", "wandb".
        workdir: eval.py's folder for its report; train.py has it as a flag.
        data, optimizer, tuning, upscaling, decorrelation, observer, test_time, evaluation, sample:
            see there.
    """

    mode: str = "pretrain"
    init: str = ""
    state: str = ""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 1000
    seed: int = 0
    log_every: int = 10
    save_every: int = 0
    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0
    stop_after_bad: int = 10
    allow_nan: bool = False
    profile_steps: str = ""
    trackers: tuple[str, ...] = ()
    workdir: str = ""
    data: Data = dataclasses.field(default_factory=Data)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    tuning: StateTuning = dataclasses.field(default_factory=StateTuning)
    upscaling: Upscaling = dataclasses.field(default_factory=Upscaling)
    decorrelation: Decorrelation = dataclasses.field(default_factory=Decorrelation)
    observer: Observing = dataclasses.field(default_factory=Observing)
    test_time: TestTime = dataclasses.field(default_factory=TestTime)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    sample: Sample = dataclasses.field(default_factory=Sample)

    def __post_init__(self):
        """Check what the types cannot say."""
        known = [field.name for field in dataclasses.fields(RWKV7Config)]
        for key in self.model:
            if key not in known:
                raise ValueError(_unknown("config.model", key, known))
        for name in ("steps", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"`config.{name}` must be at least 1; got {getattr(self, name)}.")
        for name in ("save_every", "keep_every", "keep_best", "stop_after_bad"):
            if getattr(self, name) < 0:
                raise ValueError(f"`config.{name}` must be at least 0; got {getattr(self, name)}.")
        profiled(self.profile_steps)
        for group, name, known in _CHOICES:
            value = getattr(getattr(self, group), name)
            if value not in known:
                known = f"{', '.join(known[:-1])} or {known[-1]}"
                raise ValueError(f"`config.{group}.{name}` must be {known}; got {value!r}.")
        if (self.data.order, self.data.packing) == ("cubic", "documents"):
            raise ValueError(
                '`config.data.order` must be "shuffled" where `config.data.packing` is '
                '"documents"; got "cubic".'
            )
        rows, pieces = self.data.batch_size, self.optimizer.accumulate
        if rows < 1 or pieces < 1 or rows % pieces:
            raise ValueError(
                "`config.data.batch_size` must be a multiple of `config.optimizer.accumulate`; "
                f"got {rows} and {pieces}."
            )

    @property
    def kept_best(self) -> int:
        """Checkpoints kept because they measured best; patience needs one to go back to."""
        return max(self.keep_best, 1 if self.evaluation.patience else 0)


def profiled(steps: str) -> tuple[int, int] | None:
    """The first and the last step that `config.profile_steps` names; None where it is empty.

    Raises:
        ValueError: it is no such pair.
    """
    if not steps:
        return None
    first, _, last = steps.partition(":")
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise ValueError(
        f'`config.profile_steps` must be "first:last", steps from 1 on; got {steps!r}.'
    )


def _unknown(where: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    return f"`{where}.{key}` is no setting; the nearest is `{where}.{near}`."


def _value(where: str, kind, value):
    """`value` as the field's type, or an error that names the field."""
    if dataclasses.is_dataclass(kind):
        return _from_dict(kind, value, where)
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for choice in choices:
        origin = typing.get_origin(choice) or choice
        if value is None and choice is type(None):
            return None
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(value)
        if origin is not type(None) and isinstance(value, origin):
            if not (origin is int and isinstance(value, bool)):
                return value
    wanted = " or ".join(getattr(choice, "__name__", str(choice)) for choice in choices)
    raise ValueError(f"`{where}` must be {wanted}; got {value!r}.")


def _from_dict(cls, values: Any, where: str):
    if not isinstance(values, Mapping):
        raise ValueError(f"`{where}` must be a group of settings; got {values!r}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ValueError(_unknown(where, key, list(fields)))
    hints = typing.get_type_hints(cls)
    return cls(**{key: _value(f"{where}.{key}", hints[key], v) for key, v in values.items()})


def read_settings(values: Mapping[str, Any]) -> Settings:
    """The run that a nested mapping describes; keys left out take their defaults.

    Raises:
        ValueError: an unknown key (the message names the nearest known one), a value of the wrong
            type, or one that cannot be.
    """
    return _from_dict(Settings, values, "config")
