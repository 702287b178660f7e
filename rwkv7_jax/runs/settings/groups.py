"""The groups of settings of a run, each a frozen dataclass with defaults and ranges.

Inside the program an absent value is None. Config files and run directories spell it "", 0 or ()
for some settings; `conversion` converts between the two.
"""

import dataclasses
import importlib
import re
from collections.abc import Mapping
from typing import Any, Literal

from rwkv7_jax.data.choices import Packing
from rwkv7_jax.local_paths import local_path, split_list, split_paths
from rwkv7_jax.optim.decorrelation import Method as DecorrelationMethod
from rwkv7_jax.optim.optimizer import KINDS as OPTIMIZERS
from rwkv7_jax.optim.optimizer import SCHEDULES
from rwkv7_jax.reports.metric_writers import TRACKERS
from rwkv7_jax.runs.settings.conversion import check_model_sizes, from_mapping
from rwkv7_jax.runs.settings.data import DataSettings
from rwkv7_jax.runs.settings.fields import (
    MOST_COUNT,
    MOST_RATE,
    MOST_WEIGHT,
    choice,
    choose,
    number,
    optional,
    place,
    shown,
    store,
)
from rwkv7_jax.runs.settings.names import check_names, setting_types
from rwkv7_jax.runs.settings.readers import TEXT_STATES, refuse_unread_settings
from rwkv7_jax.runs.settings.test_time import TestTimeSettings
from rwkv7_jax.runs.settings.tuning import (
    DecorrelationSettings,
    TuningSettings,
    UpscalingSettings,
)
from rwkv7_jax.sharding import AUTO, TENSOR, parse_sizes

Mode = Literal["pretrain", "state", "upscaled_state", "observer", "test_time"]

# First and last step of a profile. `int` rejects numbers with thousands of digits.
_STEPS = re.compile(r"([0-9]{1,10}):([0-9]{1,10})")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer; see `optim.optimizer`.

    Attributes:
        kind: "adamw" or "muon".
        learning_rate: peak learning rate, after the warmup. By default 6e-4, or the result of a
            search if a state is tuned on text (see `tuning.rates`).
        final_learning_rate: learning rate of the last step, for decaying schedules. By default
            6e-5, or a tenth of `learning_rate` if that is less. With a learning rate search it is
            a hundredth of the result and cannot be set.
        schedule: "cosine", "linear", "wsd" or "constant"; see `learning_rate_schedule`.
        warmup_steps: updates of the warmup.
        weight_decay: weight decay of the parameter groups that decay.
        clip: largest norm of the gradient; None for no limit.
        b1, b2, eps: constants of Adam.
        l2wrap: weight of RWKV's penalty on the largest logit.
        accumulate: microbatches per batch (gradient accumulation).
        decorrelate: in mode "pretrain": "none", "dbp" (decorrelated backpropagation of the blocks'
            projections) or "whiten" (once, from the first batch). With `accumulate` above 1 it
            costs a second forward pass over `config.decorrelation.rows` rows.
    """

    kind: str = choice("adamw", OPTIMIZERS)
    learning_rate: float | None = number(None, 0, MOST_RATE)
    final_learning_rate: float | None = number(None, 0, MOST_RATE)
    schedule: str = choice("cosine", SCHEDULES)
    warmup_steps: int = number(10, 0, MOST_COUNT)
    weight_decay: float = number(0.0, 0, MOST_RATE)
    clip: float | None = number(
        1.0, 0, MOST_WEIGHT, above=True, note=", or None for no limit"
    )
    b1: float = number(0.9, 0, 1, below=True)
    b2: float = number(0.99, 0, 1, below=True)
    eps: float = number(1e-18, 0, 1)
    l2wrap: float = number(0.0, 0, MOST_WEIGHT)
    accumulate: int = number(1, 1, MOST_COUNT)
    decorrelate: DecorrelationMethod = "none"


def default_final_rate(learning_rate: float | None) -> float:
    """Returns the default learning rate of the last step, which is below the peak."""
    assert learning_rate is not None
    return min(6e-5, 0.1 * learning_rate)


@dataclasses.dataclass(frozen=True)
class ObserverSettings:
    """The settings of mode "observer"; `init` is the teacher.

    Attributes:
        model: sizes of the observer, fields of `RWKV7Config`; its vocabulary is the teacher's.
        variance: weight of the fraction of the states' variance that a proposal leaves unexplained.
        divergence: weight of KL(teacher || observer) on the prompt.
        answers: weight of the frozen teacher's loss after the proposal.
        least, most: range of the random prompt lengths; by default up to the end of the row.
    """

    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variance: float = number(1.0, 0, MOST_WEIGHT)
    divergence: float = number(0.5, 0, MOST_WEIGHT)
    answers: float = number(1.0, 0, MOST_WEIGHT)
    least: int = number(1, 0, MOST_COUNT)
    most: int | None = number(None, 0, MOST_COUNT, absent=0)


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The evaluations of a run, on held-out data.

    Attributes:
        every: steps between evaluations; by default only the first and the last step are
            evaluated.
        windows: windows of text.
        length: tokens per window.
        prompt_tokens: lengths of prompts from the training data that the base model reads, for
            comparison; -1 is all of it.
        retention: other text, to measure what tuning costs there; or tasks such as
            "task:dictionary,task:mapping".
        measure: metric that selects the best step, such as "held_out_accuracy"; by default the
            first one.
        patience: evaluations without an improvement after which a run ends (early stopping); 0 for
            no limit. With patience, the result is the best step, not the last one.
        enough: value of the metric at which a run ends; None for no such value.
    """

    every: int | None = number(None, 0, MOST_COUNT, absent=0)
    windows: int = number(32, 1, MOST_COUNT)
    length: int = number(512, 1, MOST_COUNT)
    prompt_tokens: tuple[int, ...] = number((), -1, MOST_COUNT, note=" (-1: all)")
    retention: str = place("", several=True)
    measure: str | None = optional()
    patience: int | None = number(None, 0, MOST_COUNT, absent=0)
    enough: float | None = number(None, -1e30, 1e30)


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Sample texts, which every evaluation generates.

    Attributes:
        prompts: prompts, with one sample each.
        tokens: most tokens of a sample.
        temperature: sampling temperature; 0 is greedy.
        top_p: probability mass to keep.
    """

    prompts: tuple[str, ...] = ()
    tokens: int = number(120, 0, MOST_COUNT)
    temperature: float = number(0.8, 0, MOST_RATE)
    top_p: float = number(0.9, 0, 1)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of one run.

    Attributes:
        mode: "pretrain", "state", "upscaled_state", "observer" or "test_time".
        init: checkpoint to start from; None for a new model with the sizes in `model`.
        state: tuned start states for eval.py, comma-separated.
        start: initial state of the modes that tune a start state, in place of zeros: a state file,
            or a text that the model reads as a prompt.
        questions: .jsonl files of questions that eval.py answers, comma-separated; judged by
            `test_time.verifier`.
        tasks: tasks of lm-evaluation-harness that eval.py measures, comma-separated.
        task_data: local files by task: "train.jsonl,test.jsonl", or only the test questions; for a
            group, a folder.
        shots: examples before each question; by default the task's number.
        limit: use only this many first questions of each task, or of `questions`; all by default.
        bos: ids before each context of a task, after the start state.
        model: fields of `RWKV7Config` for a new model, or changes (dtype, remat, implementation) to
            `init`; and `weights`, "int8" to hold the frozen matrices of `init` in 8 bits. The dtype
            "auto" is float32 on CPUs and bfloat16 elsewhere; a resumed run keeps its dtype.
        steps: number of steps.
        seed: seed of initialisation and data order.
        log_every: steps between log lines.
        save_every: steps between checkpoints; by default only the end is saved.
        keep: number of newest checkpoints to keep.
        keep_every: checkpoints whose step is a multiple of this are never removed.
        keep_best: number of best checkpoints to keep; evaluations save them.
        stop_after_bad: the run stops after this many consecutive updates with a non-finite loss or
            gradient; such updates are skipped.
        mesh: how devices share a step: "auto", or sizes such as "data=2,fsdp=4".
        allow_nan: accept a checkpoint with NaN or Inf.
        any_base: accept states, also in `start`, that were tuned for other weights.
        profile_steps: "first:last", the steps that process 0 profiles.
        trackers: where metrics go besides the run's files: "tensorboard", "wandb".
        workdir: eval.py's folder for its report; train.py has a flag for it.
        backup: object store (gs://, s3:// or file://) for a copy of every checkpoint and of the
            run's files, from which a new machine resumes. Processes without a shared folder write
            their shards there.
        imports: modules to import first, which add feature maps or forms of memory (see
            `model.FEATURE_MAPS` and `model.MEMORY_FORMS`).
        data, optimizer, tuning, upscaling, decorrelation, observer, test_time, evaluation, sample:
            groups of settings; see their classes.
    """

    # The names are keys in config files and in checkpoints of older runs, so they cannot change.
    mode: Mode = "pretrain"
    init: str | None = place(None)
    state: str = place("", several=True)
    start: str | None = place(None)
    questions: str = place("", several=True)
    tasks: str = ""
    task_data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shots: int | None = number(None, 0, MOST_COUNT)
    limit: int | None = number(None, 0, MOST_COUNT, absent=0)
    bos: tuple[int, ...] = number((), 0, MOST_COUNT)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = number(1000, 1, MOST_COUNT)
    seed: int = number(0, 0, 2**32 - 1)
    log_every: int = number(10, 1, MOST_COUNT)
    save_every: int | None = number(None, 0, MOST_COUNT, absent=0)
    keep: int = number(2, 1, MOST_COUNT)
    keep_every: int | None = number(None, 0, MOST_COUNT, absent=0)
    keep_best: int = number(0, 0, MOST_COUNT)
    stop_after_bad: int | None = number(10, 0, MOST_COUNT, absent=0)
    mesh: str = AUTO
    allow_nan: bool = False
    any_base: bool = False
    profile_steps: str | None = optional()
    trackers: tuple[str, ...] = ()
    workdir: str | None = place(None, target=True)
    backup: str | None = store()
    imports: tuple[str, ...] = ()
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
        """Sets the default learning rates, and checks constraints between settings."""
        self._fill_in_rates()
        check_model_sizes("config.model", self.model)
        check_model_sizes("config.observer.model", self.observer.model)
        window = self.profile_window
        if window and window[1] > self.steps:
            raise ValueError(
                f"`config.profile_steps` must end within `config.steps`, {self.steps}; got "
                f"{self.profile_steps!r}."
            )
        self._check_mesh()
        # Slicing the last 0 tokens would give the whole text.
        if 0 in self.evaluation.prompt_tokens:
            raise ValueError(
                "`config.evaluation.prompt_tokens` must be at least 1, or -1 for all; got 0."
            )
        for tracker in self.trackers:
            choose("config.trackers", TRACKERS, tracker)
        self._check_tasks()
        if self.tuning.states is not None and self.data.path:
            raise ValueError(
                "`config.data.path` must be empty if `config.tuning.states` names the texts; "
                f"got {self.data.path!r}."
            )
        self._check_packing()
        if self.rows % self.optimizer.accumulate:
            source = "`config.data.batch_size`"
            if self.draws_its_rows:
                source = "`config.test_time.prompts` x `config.test_time.group`"
            raise ValueError(
                f"{source} must be a multiple of `config.optimizer.accumulate`; "
                f"got {self.rows} and {self.optimizer.accumulate}."
            )

    def _fill_in_rates(self) -> None:
        """Sets the default learning rates, unless a search finds them."""
        if self.finds_rate:
            if not self.tuning.rates:
                raise ValueError(
                    "`config.tuning.rates` must hold learning rates to try if "
                    "`config.optimizer.learning_rate` is not set; got none."
                )
            final = self.optimizer.final_learning_rate
            if final is not None:
                raise ValueError(
                    "`config.optimizer.final_learning_rate` must be left out if "
                    "`config.optimizer.learning_rate` is, because it is a hundredth of the rate "
                    f"that a search finds; got {final:g}."
                )
            return
        optimizer = self.optimizer
        if optimizer.learning_rate is None:
            optimizer = dataclasses.replace(optimizer, learning_rate=6e-4)
        if optimizer.final_learning_rate is None:
            final = default_final_rate(optimizer.learning_rate)
            optimizer = dataclasses.replace(optimizer, final_learning_rate=final)
        # The dataclass is frozen.
        object.__setattr__(self, "optimizer", optimizer)

    @property
    def finds_rate(self) -> bool:
        """Whether the run searches for its learning rate: it tunes states on text, without one."""
        return self.mode in TEXT_STATES and self.optimizer.learning_rate is None

    @property
    def packing_of_answers(self) -> Packing:
        """The meaning of `data.packing` "auto" for questions; for other text it is "stream".

        A tuned state is used at the beginning of a question, so its training rows must begin there,
        too, not inside a question.
        """
        if self.mode not in TEXT_STATES:
            return "stream"
        has_sequences = self.mode == "state" or self.upscaling.dynamics == "static"
        # The Triton kernel supports only one sequence per row.
        if has_sequences and self.model.get("implementation") != "triton":
            return "packed"
        return "documents"

    def _check_packing(self) -> None:
        """Checks that the order and the mode support the packing."""
        packing = self.data.packing
        # The cubic order selects positions in one long stream of tokens.
        if self.data.order == "cubic" and packing not in ("auto", "stream"):
            raise ValueError(
                f'`config.data.order` must be "shuffled" if `config.data.packing` is "{packing}"; '
                'got "cubic".'
            )
        if packing != "packed":
            return
        # Their losses start each document of a row from the start state.
        modes = ("pretrain", *TEXT_STATES)
        if self.mode not in modes:
            raise ValueError(
                '`config.data.packing` must be "stream" or "documents" outside modes '
                f'{", ".join(modes)}; got "packed" in mode {self.mode!r}.'
            )
        dynamics = self.upscaling.dynamics
        if self.mode == "upscaled_state" and dynamics != "static":
            raise ValueError(
                '`config.upscaling.dynamics` must be "static" if `config.data.packing` is '
                f'"packed"; got {dynamics!r}.'
            )

    def _check_mesh(self) -> None:
        """Checks the sizes of a mesh, and that a run with several states does not shard heads."""
        sizes = parse_sizes(self.mesh, "`config.mesh`")
        if isinstance(sizes, str) or sizes.get(TENSOR, 1) == 1:
            return
        what = None
        if self.tuning.states is not None:
            what = "`config.tuning.states` is set"
        elif self.finds_rate:
            what = "`config.optimizer.learning_rate` is left to a search"
        if what:
            raise ValueError(
                f"`config.mesh` must have no tensor axis if {what}; got {self.mesh!r}."
            )

    def _check_tasks(self) -> None:
        """Checks the names of tasks and of their files, before anything is read."""
        names = self.task_names
        for task, files in self.task_data.items():
            name = f"config.task_data.{task}"
            if not isinstance(files, str) or not files:
                raise ValueError(
                    f"`{name}` must be train.jsonl,test.jsonl or test.jsonl, or, for a group, a "
                    f"folder; got {shown(files)}."
                )
            for file in split_paths(files, f"`{name}`"):
                local_path(file, f"`{name}`")
            if task not in names:
                raise ValueError(
                    f"`{name}` must belong to a task in `config.tasks`; got {self.tasks!r}."
                )

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks of lm-evaluation-harness."""
        return list(split_list(self.tasks, "`config.tasks`"))

    @property
    def task_files(self) -> dict[str, list[str]]:
        """The local files of tasks, by task."""
        files = {}
        for task, text in self.task_data.items():
            files[task] = list(split_paths(text, f"`config.task_data.{task}`"))
        return files

    @property
    def state_paths(self) -> list[str]:
        """The files of the tuned start states."""
        return list(split_paths(self.state, "`config.state`"))

    @property
    def draws_its_rows(self) -> bool:
        """Whether the model generates the rows of a step."""
        return self.mode == "test_time" and self.test_time.method in ("grpo", "expert")

    @property
    def rows(self) -> int:
        """The rows of a step."""
        if self.draws_its_rows:
            return self.test_time.prompts * self.test_time.group
        return self.data.batch_size

    @property
    def rows_per_step(self) -> int:
        """The rows that a step computes at once."""
        # Generated rows are one batch per step; other rows are cut into batches.
        pieces = 1 if self.draws_its_rows else self.optimizer.accumulate
        return self.rows // pieces

    @property
    def profile_window(self) -> tuple[int, int] | None:
        """The first and the last step of `profile_steps`; None without it."""
        if self.profile_steps is None:
            return None
        match = _STEPS.fullmatch(self.profile_steps)
        if match and 1 <= int(match[1]) <= int(match[2]):
            return int(match[1]), int(match[2])
        raise ValueError(
            '`config.profile_steps` must be "first:last", with steps from 1; got '
            f"{shown(self.profile_steps)}."
        )

    @property
    def untuned(self) -> str:
        """The untuned state, as messages name it."""
        return "no state" if self.start is None else "the state of `config.start`"

    @property
    def kept_best(self) -> int:
        """The number of best checkpoints to keep; at least one if the run may go back to it."""
        goes_back = bool(self.evaluation.patience)
        # A member that is good enough keeps its best step until the others end.
        if self.tuning.states is not None and self.evaluation.enough is not None:
            goes_back = True
        return max(self.keep_best, int(goes_back))


def read_settings(values: Mapping[str, Any]) -> Settings:
    """Reads settings from a nested mapping; missing keys take their defaults.

    Raises:
        ValueError: a key is unknown (the message names the nearest known one), or a value has the
            wrong type or is not allowed, or a module cannot be imported.
    """
    check_names(values, setting_types(Settings))
    if isinstance(values, Mapping) and "imports" in values:
        # First, because the other settings may use names that they add.
        imports = {"imports": values["imports"]}
        for module in from_mapping(Settings, imports, "config").imports:
            _import(module)
    settings = from_mapping(Settings, values, "config")
    # Here, because a program may fill in what a command has left open.
    refuse_unread_settings(settings)
    return settings


def _import(module: str) -> None:
    """Imports a module of `config.imports`.

    Raises:
        ValueError: the import fails.
    """
    try:
        importlib.import_module(module)
    # A user's module may raise anything when it is imported.
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"`config.imports` must name modules that can be imported; got {module!r}: {reason}."
        ) from None
