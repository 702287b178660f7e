"""The groups of settings of a run, each a frozen dataclass with its defaults.

Inside the program an absent value is None. Config files and run folders spell some of them "", 0 or
(), which older runs hold and users type; `read_settings` and `as_config` convert between the two.
The reader is ours because a library would not say `config.optimizer.learnig_rate` is no setting,
nor name the nearest one.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from rwkv7_jax.data.choices import OnBad, Order, Packing
from rwkv7_jax.local_paths import split_list
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.optim.decorrelation import Method as DecorrelationMethod

Mode = Literal["pretrain", "state", "upscaled_state", "observer", "test_time"]

TestTimeMethod = Literal["grpo", "distil", "expert", "context"]


def _absent(spelling: Any, *, default: Any = None) -> Any:
    """Makes a field that may be None, which config files spell otherwise.

    Args:
        spelling: of None in config files.
        default: of the field.
    """
    return dataclasses.field(default=default, metadata={"absent": spelling})


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The data of a run.

    Attributes:
        path: a .jsonl file of texts, questions with answers or conversations (see
            `data.jsonl`), a text file, a folder of these, a built-in corpus, or a .bin file that
            `rwkv7 data` or RWKV's tools made of them; several with commas; or a synthetic task such
            as "task:copy" (see `data.synthetic_tasks`).
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
        as_bytes: takes files that are no text (tables, archives, pictures), and reads their bytes.
        encoding: of the text, such as "utf-16" or "gbk"; by default it is UTF-8.
    """

    path: str = ""
    held_out: float = 0.05
    batch_size: int = 8
    length: int = 512
    on_bad: OnBad = "error"
    packing: Packing = "stream"
    order: Order = "shuffled"
    evaluation: str | None = _absent("")
    as_bytes: bool = False
    encoding: str | None = _absent("")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer; see `optim.optimizer`.

    Attributes:
        kind: "adamw" or "muon".
        learning_rate: the highest one, after the warm-up.
        final_learning_rate: the one of the last step, under schedules that fall.
        schedule: "cosine", "linear", "wsd" or "constant"; see `learning_rate_schedule`.
        warmup_steps: updates of the warm-up.
        weight_decay: of the groups that decay.
        clip: largest norm of the gradient; None for no limit.
        b1, b2, eps: of Adam.
        l2wrap: weight of RWKV's penalty on the largest logit.
        accumulate: pieces in which a batch is computed.
        decorrelate: of mode "pretrain": "none", "dbp" (decorrelated backpropagation of the blocks'
            projections) or "whiten" (once, from the first batch). It costs a second forward pass
            over `config.decorrelation.rows` rows.
    """

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
    decorrelate: DecorrelationMethod = "none"


@dataclasses.dataclass(frozen=True)
class TuningSettings:
    """The settings of the modes that tune a state.

    Attributes:
        leaves: "wkv", or "all" to tune the token-shift states as well; an upscaled state tunes its
            memory in their place.
        decorrelate: "none", "dbp" (decorrelated backpropagation, learnt while tuning) or "whiten"
            (once: of features on the calibration text, of a start state at the first step).
        anchor: weight of KL(base || tuned) on the unlabelled text of `anchor_path`; 0 switches it
            off.
        anchor_path: general text, or a task, on which the tuned model must stay close to the base.
        alpha: factor on the saved state; below 1 it keeps most of the target and forgets less.
        warn_above: largest entry of the state that passes without a warning.
    """

    leaves: Literal["wkv", "all"] = "wkv"
    decorrelate: DecorrelationMethod = "none"
    anchor: float = 0.0
    anchor_path: str | None = _absent("")
    alpha: float = 1.0
    warn_above: float = 50.0


@dataclasses.dataclass(frozen=True)
class UpscalingSettings:
    """The settings of mode "upscaled_state"; see `tuning.upscaling.upscale`.

    Attributes:
        size: features of a head (M); by default four times the head size.
        dynamics: "static", "decay", "delta"; "replace" and "replace_raw" are the paper's form.
        kind: "gaussian" (by default), "fourier" or "gaussian_raw".
        landmarks: "random" or "kmeans".
        widths: factors on 1 / the median squared distance; by default 1, 4 and 16 where features
            are whitened and 1 elsewhere.
        prepare: "none", "centre" or "whiten"; by default as `tuning.decorrelate` says.
        rows: rows of the training text that features are calibrated on.
    """

    size: int | None = _absent(0)
    dynamics: str = "static"
    kind: str | None = _absent("")
    landmarks: str = "random"
    widths: tuple[float, ...] | None = _absent(())
    prepare: str | None = _absent("")
    rows: int = 48


@dataclasses.dataclass(frozen=True)
class DecorrelationSettings:
    """Numbers of `tuning.decorrelate` and `optimizer.decorrelate`; see `optim.decorrelation`.

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
    """The settings of mode "observer"; `init` is the teacher.

    Attributes:
        model: sizes of the observer, fields of `RWKV7Config`; its vocabulary is the teacher's.
        variance: weight of the states' variance that a proposal leaves unexplained.
        divergence: weight of KL(teacher || observer) on the prompt.
        answers: weight of the frozen teacher's loss after the proposal.
        least, most: prompts end at positions drawn from this range; by default up to the row's end.
    """

    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variance: float = 1.0
    divergence: float = 0.5
    answers: float = 1.0
    least: int = 1
    most: int | None = _absent(0)


@dataclasses.dataclass(frozen=True)
class TestTimeSettings:
    """The settings of mode "test_time".

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

    method: TestTimeMethod = "grpo"
    guide: str | None = _absent("")
    context: str | None = _absent("")
    verifier: str = "exact"
    keep: Literal["verified", "majority", "all"] = "verified"
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
    """The evaluations of a run, on held-out data.

    Attributes:
        every: steps between two evaluations; by default only the first and the last step are
            evaluated.
        windows: pieces of text.
        length: tokens of a piece.
        prompt_tokens: text of the training part that the base model reads as a prompt, for
            comparison; -1 is all of it.
        retention: other text, to see what tuning costs there; or tasks such as
            "task:dictionary,task:mapping".
        measure: the metric that decides which step is best, such as "held_out_accuracy"; by default
            the first one.
        patience: evaluations in a row without a new best one after which a run ends; 0 for none.
            Where there is patience, the result is the best step's and not the last one's.
        enough: value of the measure at which a run ends; None for none.
    """

    every: int | None = _absent(0)
    windows: int = 32
    length: int = 512
    prompt_tokens: tuple[int, ...] = ()
    retention: str = ""
    measure: str | None = _absent("")
    patience: int | None = _absent(0)
    enough: float | None = None


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Sample text, written at every evaluation after each of the prompts."""

    prompts: tuple[str, ...] = ()
    tokens: int = 120
    temperature: float = 0.8
    top_p: float = 0.9


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of one run.

    Attributes:
        mode: "pretrain", "state", "upscaled_state", "observer" or "test_time".
        init: checkpoint to start from; None for a new model of `model`'s sizes.
        state: tuned start states for eval.py, several with commas.
        model: fields of `RWKV7Config` for a new model, or changes (dtype, remat, implementation) to
            `init`.
        steps: updates.
        seed: of initialisation and data order.
        log_every: steps between two lines of the log.
        save_every: steps between two checkpoints; by default only the end is saved.
        keep: newest checkpoints kept.
        keep_every: checkpoints whose step is a multiple of this are never removed.
        keep_best: how many of the best checkpoints are kept; evaluations save them.
        stop_after_bad: the run stops after so many updates in a row whose loss or gradient was not
            finite; such updates are skipped.
        allow_nan: take a checkpoint that holds NaN or Inf.
        profile_steps: "first:last", steps of which a profile is written.
        trackers: where metrics go besides the run's files: "tensorboard", "wandb".
        workdir: eval.py's folder for its report; train.py has it as a flag.
        data, optimizer, tuning, upscaling, decorrelation, observer, test_time, evaluation, sample:
            groups of settings; see their classes.
    """

    # Names are keys in config files and in checkpoints of older runs; they cannot change.
    mode: Mode = "pretrain"
    init: str | None = _absent("")
    state: str = ""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 1000
    seed: int = 0
    log_every: int = 10
    save_every: int | None = _absent(0)
    keep: int = 2
    keep_every: int | None = _absent(0)
    keep_best: int = 0
    stop_after_bad: int | None = _absent(0, default=10)
    allow_nan: bool = False
    profile_steps: str | None = _absent("")
    trackers: tuple[str, ...] = ()
    workdir: str | None = _absent("")
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    tuning: TuningSettings = dataclasses.field(default_factory=TuningSettings)
    upscaling: UpscalingSettings = dataclasses.field(default_factory=UpscalingSettings)
    decorrelation: DecorrelationSettings = dataclasses.field(
        default_factory=DecorrelationSettings
    )
    observer: ObserverSettings = dataclasses.field(default_factory=ObserverSettings)
    test_time: TestTimeSettings = dataclasses.field(default_factory=TestTimeSettings)
    evaluation: EvaluationSettings = dataclasses.field(
        default_factory=EvaluationSettings
    )
    sample: SampleSettings = dataclasses.field(default_factory=SampleSettings)

    def __post_init__(self):
        """Checks what the types cannot say."""
        fields = [field.name for field in dataclasses.fields(RWKV7Config)]
        for key in self.model:
            if key not in fields:
                raise ValueError(_unknown_key("config.model", key, fields))
        for name in ("steps", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`config.{name}` must be at least 1; got {getattr(self, name)}."
                )
        for name in ("save_every", "keep_every", "keep_best", "stop_after_bad"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`config.{name}` must be at least 0; got {value}.")
        profiled(self.profile_steps)
        self._check_lists()
        # Elsewhere it would silently do nothing.
        if self.optimizer.decorrelate != "none" and self.mode != "pretrain":
            raise ValueError(
                '`config.optimizer.decorrelate` must be "none" outside mode "pretrain", where '
                f"`config.tuning.decorrelate` has its place; got {self.optimizer.decorrelate!r}."
            )
        # The cubic order cuts rows at positions of one long stream; documents have none.
        if (self.data.order, self.data.packing) == ("cubic", "documents"):
            raise ValueError(
                '`config.data.order` must be "shuffled" where `config.data.packing` is '
                '"documents"; got "cubic".'
            )
        rows = self.data.batch_size
        pieces = self.optimizer.accumulate
        if rows < 1 or pieces < 1 or rows % pieces:
            raise ValueError(
                "`config.data.batch_size` must be a multiple of `config.optimizer.accumulate`; "
                f"got {rows} and {pieces}."
            )

    def _check_lists(self) -> None:
        """Checks that no list of names has an empty entry, before anything is read."""
        lists = {
            "data.path": self.data.path,
            "data.evaluation": self.data.evaluation,
            "tuning.anchor_path": self.tuning.anchor_path,
            "evaluation.retention": self.evaluation.retention,
            "state": self.state,
        }
        for name, text in lists.items():
            split_list(text or "", f"`config.{name}`")
        for tracker in self.trackers:
            if not isinstance(tracker, str) or not tracker.strip():
                raise ValueError(
                    f"`config.trackers` must hold names of trackers; got {self.trackers!r}."
                )

    @property
    def state_paths(self) -> list[str]:
        """The files of the tuned start states."""
        return list(split_list(self.state, "`config.state`"))

    @property
    def rows_per_step(self) -> int:
        """The rows that a step computes at once."""
        # What the model itself writes is one batch a step; everything else is cut into batches.
        if self.mode == "test_time" and self.test_time.method in ("grpo", "expert"):
            return self.test_time.prompts * self.test_time.group
        return self.data.batch_size // self.optimizer.accumulate

    @property
    def kept_best(self) -> int:
        """How many best checkpoints are kept; with patience at least one, to go back to."""
        return max(self.keep_best, 1 if self.evaluation.patience else 0)


def profiled(steps: str | None) -> tuple[int, int] | None:
    """Parses `config.profile_steps` into the first and the last step; None where it is absent.

    Raises:
        ValueError: it is not "first:last".
    """
    if steps is None:
        return None
    first, _, last = steps.partition(":")
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise ValueError(
        f'`config.profile_steps` must be "first:last", steps from 1 on; got {steps!r}.'
    )


def read_settings(values: Mapping[str, Any]) -> Settings:
    """Reads the settings that a nested mapping holds; keys left out take their defaults.

    Raises:
        ValueError: an unknown key (the message names the nearest known one), a value of the wrong
            type, or one that is not allowed.
    """
    return _from_dict(Settings, values, "config")


def as_config(settings: Any) -> dict[str, Any]:
    """Gives the nested mapping that `read_settings` reads, spelled as in config files."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            value = as_config(value)
        elif value is None:
            # Run folders of older versions hold this spelling, and are compared with it.
            value = field.metadata.get("absent")
        values[field.name] = value
    return values


def _unknown_key(where: str, key: str, fields: list[str]) -> str:
    # Without a cutoff even a far-off key gets a suggestion.
    nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
    return f"`{where}.{key}` is no setting; the nearest is `{where}.{nearest}`."


def _from_dict(cls, values: Any, where: str):
    if not isinstance(values, Mapping):
        raise ValueError(f"`{where}` must be a group of settings; got {values!r}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(_unknown_key(where, key, list(fields)))
        metadata = fields[key].metadata
        if "absent" in metadata and _is_spelling(value, metadata["absent"]):
            arguments[key] = None
        else:
            arguments[key] = _convert(f"{where}.{key}", hints[key], value)
    return cls(**arguments)


def _is_spelling(value: Any, absent: Any) -> bool:
    """Tells whether a config's value is the spelling of an absent one; `False` is not 0."""
    if isinstance(value, list):
        value = tuple(value)
    return type(value) is type(absent) and value == absent


def _convert(where: str, kind: Any, value: Any) -> Any:
    """Converts a value to the field's type, or raises an error that names the field."""
    if dataclasses.is_dataclass(kind):
        return _from_dict(kind, value, where)
    if typing.get_origin(kind) is Literal:
        return _choose(where, typing.get_args(kind), value)
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        origin = typing.get_origin(option) or option
        if value is None and option is type(None):
            return None
        # In Python `True` is an integer; in a config it is a mistake.
        if isinstance(value, bool) and origin in (int, float):
            continue
        if origin is float and isinstance(value, int):
            return float(value)
        if origin is tuple and isinstance(value, list | tuple):
            return tuple(value)
        if origin is not type(None) and isinstance(value, origin):
            return value
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ValueError(f"`{where}` must be {wanted}; got {value!r}.")


def _choose(where: str, choices: tuple[str, ...], value: Any) -> str:
    if value in choices:
        return value
    listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
    raise ValueError(f"`{where}` must be {listed}; got {value!r}.")
