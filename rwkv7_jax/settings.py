"""What a run is told, as frozen dataclasses that refuse what they do not know. Level 2."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from .config import RWKV7Config


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read.

    Attributes:
        path: a .jsonl, text or .bin file, a folder of text files, or a built-in corpus, several
            with commas; or a synthetic task such as "task:copy" (see `tasks`).
        held_out: share of the documents kept for evaluation, chosen by a hash of their bytes.
        batch_size: rows of a batch.
        length: tokens of a row.
        on_bad: "error" or "skip", for lines of a .jsonl file that cannot be read.
        evaluation: what evaluation reads instead of the held-out part of `path`; all of it.
    """

    path: str = ""
    held_out: float = 0.05
    batch_size: int = 8
    length: int = 512
    on_bad: str = "error"
    evaluation: str = ""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How trainables move; see `optim.build`."""

    kind: str = "adamw"
    learning_rate: float = 6e-4
    final_learning_rate: float = 6e-5
    schedule: str = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    clip: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-18
    l2wrap: float = 0.0
    accumulate: int = 1


@dataclasses.dataclass(frozen=True)
class StateTuning:
    """What mode "state" adds.

    Attributes:
        leaves: "wkv", or "all" to tune the token-shift states as well.
        anchor: weight of KL(base || tuned) on the unlabelled text of `anchor_path`; 0 switches it
            off.
        anchor_path: general text, or a task, on which the tuned model shall stay the base model.
        alpha: factor on the saved state; below 1 it keeps most of the target and forgets less.
        warn_above: largest entry of the state that passes without a warning.
    """

    leaves: str = "wkv"
    anchor: float = 0.0
    anchor_path: str = ""
    alpha: float = 1.0
    warn_above: float = 50.0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is measured, on held-out text.

    Attributes:
        every: steps between two evaluations; 0 for one at the end alone.
        windows: pieces of text.
        length: tokens of a piece.
        prompt_tokens: text of the training part that the base model reads as a prompt, for
            comparison; -1 is all of it.
        retention: other text, to see what tuning costs there; or tasks such as
            "task:dictionary,task:mapping".
    """

    every: int = 0
    windows: int = 32
    length: int = 512
    prompt_tokens: tuple[int, ...] = ()
    retention: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text written at every evaluation; no prompts, no text."""

    prompts: tuple[str, ...] = ()
    tokens: int = 120
    temperature: float = 0.8
    top_p: float = 0.9


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run, whole.

    Attributes:
        mode: "pretrain" or "state".
        init: checkpoint to start from; empty for a new model of `model`'s sizes.
        state: tuned start state, for eval.py.
        model: fields of `RWKV7Config` for a new model, or changes (dtype, remat, implementation) to
            `init`.
        steps: updates.
        seed: of initialisation and data order.
        log_every: steps between two lines of the log.
        save_every: steps between two checkpoints; 0 for one at the end alone.
        keep: newest checkpoints kept.
        workdir: eval.py's folder for its report; train.py has it as a flag.
        data, optimizer, tuning, evaluation, sample: see there.
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
    workdir: str = ""
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    tuning: StateTuning = StateTuning()
    evaluation: Evaluation = Evaluation()
    sample: Sample = Sample()

    def __post_init__(self):
        """Check what the types cannot say."""
        known = [field.name for field in dataclasses.fields(RWKV7Config)]
        for key in self.model:
            if key not in known:
                raise ValueError(_unknown("config.model", key, known))
        for name in ("steps", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"`config.{name}` must be at least 1; got {getattr(self, name)}.")
        if self.tuning.leaves not in ("wkv", "all"):
            raise ValueError(
                f"`config.tuning.leaves` must be wkv or all; got {self.tuning.leaves!r}."
            )
        rows, pieces = self.data.batch_size, self.optimizer.accumulate
        if rows < 1 or pieces < 1 or rows % pieces:
            raise ValueError(
                "`config.data.batch_size` must be a multiple of `config.optimizer.accumulate`; "
                f"got {rows} and {pieces}."
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
