"""The groups of settings of a run, each a frozen dataclass with its defaults."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from rwkv7_jax.data.choices import ON_BAD, ORDERS, PACKINGS
from rwkv7_jax.model.config import RWKV7Config


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What is read.

    Attributes:
        path: a .jsonl file of texts, questions with answers or conversations (see
            `conversations`), a text file, a folder of these, a built-in corpus, or a .bin file that
            `rwkv7 data` or RWKV's tools made of them; several with commas; or a synthetic task such
            as "task:copy" (see `tasks`).
        held_out: share of the documents kept for evaluation, chosen by a hash of their bytes; of a
            single document its end.
        batch_size: rows of a batch, on all hosts together.
        length: tokens of a row.
        on_bad: "error" or "skip", for lines of a .jsonl file that cannot be read.
        packing: "stream" cuts rows from all documents joined: nothing is left out, and the state
            leaks from one document into the next of the same row, as in RWKV's own training;
            "documents" gives each a row of its own, cut or filled up to `length`: nothing leaks.
        order: "shuffled" by the seed, anew in every epoch, or "cubic", that of RWKV's own trainer,
            which has no seed and is the same in every epoch (for packing "stream").
        evaluation: what evaluation reads instead of the held-out part of `path`; all of it.
    """

    path: str = ""
    held_out: float = 0.05
    batch_size: int = 8
    length: int = 512
    on_bad: str = "error"
    packing: str = "stream"
    order: str = "shuffled"
    evaluation: str = ""


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
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
class TuningSettings:
    """What the modes that tune a state add.

    Attributes:
        leaves: "wkv", or "all" to tune the token-shift states as well; an upscaled state tunes its
            memory in their place.
        decorrelate: "none", "dbp" (decorrelated backpropagation, learnt while tuning) or "whiten"
            (once: of features on the calibration text, of a start state at the first step).
        anchor: weight of KL(base || tuned) on the unlabelled text of `anchor_path`; 0 switches it
            off.
        anchor_path: general text, or a task, on which the tuned model shall stay the base model.
        alpha: factor on the saved state; below 1 it keeps most of the target and forgets less.
        warn_above: largest entry of the state that passes without a warning.
    """

    leaves: str = "wkv"
    decorrelate: str = "none"
    anchor: float = 0.0
    anchor_path: str = ""
    alpha: float = 1.0
    warn_above: float = 50.0


@dataclasses.dataclass(frozen=True)
class UpscalingSettings:
    """What mode "upscaled_state" adds; see `state_tuning.upscale`.

    Attributes:
        size: features of a head (M); 0 takes four times the head size.
        dynamics: "static", "decay", "delta"; "replace" and "replace_raw" are the paper's form.
        kind: "" (Gaussian), "gaussian", "fourier" or "gaussian_raw".
        landmarks: "random" or "kmeans".
        widths: factors on 1 / the median squared distance; empty takes 1, 4 and 16 where features
            are whitened and 1 elsewhere.
        prepare: "", "none", "centre" or "whiten"; "" follows `tuning.decorrelate`.
        rows: rows of the training text that features are calibrated on.
    """

    size: int = 0
    dynamics: str = "static"
    kind: str = ""
    landmarks: str = "random"
    widths: tuple[float, ...] = ()
    prepare: str = ""
    rows: int = 48


@dataclasses.dataclass(frozen=True)
class DecorrelationSettings:
    """Numbers of `tuning.decorrelate = "dbp"`; see `optim.decorrelation.decorrelate`.

    Attributes:
        rate: step of the online rule.
        balance: between decorrelation (0) and unit variances (1).
        iterations: steps of the rule per update.
        damping: added to the covariance, in units of its mean eigenvalue.
        average: share of the old covariance in its running average.
        rows: rows of a batch that statistics are taken from.
    """

    rate: float = 0.2
    balance: float = 0.5
    iterations: int = 12
    damping: float = 1e-4
    average: float = 0.7
    rows: int = 4


@dataclasses.dataclass(frozen=True)
class ObserverSettings:
    """What mode "observer" adds; `init` is the teacher.

    Attributes:
        model: sizes of the observer, fields of `RWKV7Config`; its vocabulary is the teacher's.
        variance: weight of the states' variance that a proposal leaves unexplained.
        divergence: weight of KL(teacher || observer) on the prompt.
        answers: weight of the frozen teacher's loss behind the proposal.
        least, most: prompts end at positions drawn from this range; 0 for `most` is the row's end.
    """

    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variance: float = 1.0
    divergence: float = 0.5
    answers: float = 1.0
    least: int = 1
    most: int = 0


@dataclasses.dataclass(frozen=True)
class TestTimeSettings:
    """What mode "test_time" adds.

    Attributes:
        method: "grpo" (rewards alone), "distil" (a guide's traces), "expert" (the model's own
            verified answers) or "context" (a long prompt becomes a state).
        guide: checkpoint of the larger model that writes traces, or a .jsonl file of traces.
        context: file of the prompt that "context" distils.
        verifier: "exact", which compares with the known answer, or "module:function", called with
            the ids of prompt and completion and giving a reward.
        keep: "verified" traces, the "majority" answer's, or "all".
        substitute: (what, with what) in the guide's prompts, so that it sees more than the model.
        hint: text before the guide's prompts.
        prompts: prompts a step.
        group: completions of each.
        tokens: of a completion at most.
        temperature: of sampling.
        kl: weight of KL(tuned || base) on what was drawn.
        traces: prompts that the guide answers in all.
        at_once: prompts that it answers at the same time.
        vote_margin: share of a prompt's completions by which the "majority" answer must lead.
    """

    method: str = "grpo"
    guide: str = ""
    context: str = ""
    verifier: str = "exact"
    keep: str = "verified"
    substitute: tuple[str, ...] = ()
    hint: str = ""
    prompts: int = 8
    group: int = 8
    tokens: int = 64
    temperature: float = 1.0
    kl: float = 0.0
    traces: int = 256
    at_once: int = 64
    vote_margin: float = 0.25


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, on held-out text.

    Attributes:
        every: steps between two evaluations; 0 for one at the end alone.
        windows: pieces of text.
        length: tokens of a piece.
        prompt_tokens: text of the training part that the base model reads as a prompt, for
            comparison; -1 is all of it.
        retention: other text, to see what tuning costs there; or tasks such as
            "task:dictionary,task:mapping".
        measure: which number tells the best step, such as "held_out_accuracy"; empty takes the
            first that is measured.
        patience: evaluations in a row without a new best one after which a run ends; 0 for none.
            Where there is patience, the result is the best step's and not the last one's.
        enough: value of the measure at which a run ends; None for none.
    """

    every: int = 0
    windows: int = 32
    length: int = 512
    prompt_tokens: tuple[int, ...] = ()
    retention: str = ""
    measure: str = ""
    patience: int = 0
    enough: float | None = None


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Text written at every evaluation; no prompts, no text."""

    prompts: tuple[str, ...] = ()
    tokens: int = 120
    temperature: float = 0.8
    top_p: float = 0.9


_CHOICES = (
    ("data", "on_bad", ON_BAD),
    ("data", "packing", PACKINGS),
    ("data", "order", ORDERS),
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
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    tuning: TuningSettings = dataclasses.field(default_factory=TuningSettings)
    upscaling: UpscalingSettings = dataclasses.field(default_factory=UpscalingSettings)
    decorrelation: DecorrelationSettings = dataclasses.field(default_factory=DecorrelationSettings)
    observer: ObserverSettings = dataclasses.field(default_factory=ObserverSettings)
    test_time: TestTimeSettings = dataclasses.field(default_factory=TestTimeSettings)
    evaluation: EvaluationSettings = dataclasses.field(default_factory=EvaluationSettings)
    sample: SampleSettings = dataclasses.field(default_factory=SampleSettings)

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
