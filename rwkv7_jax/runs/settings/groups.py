"""The groups of settings of a run, each a frozen dataclass with its defaults and ranges.

Inside the program an absent value is None. Config files and run folders spell some of them "", 0 or
(), which older runs hold and users type; `conversion` converts between the two.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from rwkv7_jax.data.choices import OnBad, Order, Packing
from rwkv7_jax.local_paths import local_path, split_list, split_paths
from rwkv7_jax.optim.decorrelation import Method as DecorrelationMethod
from rwkv7_jax.optim.optimizer import KINDS as OPTIMIZERS
from rwkv7_jax.optim.optimizer import SCHEDULES
from rwkv7_jax.runs.settings.conversion import check_model_sizes, from_mapping
from rwkv7_jax.runs.settings.fields import (
    MOST_COUNT,
    MOST_RATE,
    MOST_WEIGHT,
    choice,
    number,
    optional,
    place,
    profiled,
    shown,
    store,
)
from rwkv7_jax.runs.settings.names import check_names, setting_types
from rwkv7_jax.runs.settings.packing import (
    PackingChoice,
    check_packing,
    packing_of_answers,
)
from rwkv7_jax.runs.settings.readers import refuse_unread_settings
from rwkv7_jax.runs.settings.test_time import TestTimeSettings
from rwkv7_jax.runs.settings.tuning import (
    DecorrelationSettings,
    TuningSettings,
    UpscalingSettings,
)
from rwkv7_jax.sharding import AUTO, TENSOR, parse_sizes

Mode = Literal["pretrain", "state", "upscaled_state", "observer", "test_time"]


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The data of a run.

    Attributes:
        path: a .jsonl file or a table of texts, questions with answers or conversations (see
            `data.records.record`), a text file, a folder of these, a built-in corpus, or a .bin
            file that `rwkv7 data` or RWKV's tools made of them (also without suffix, as RWKV-LM
            names it); several with commas; or a synthetic task such as "task:copy" (see
            `data.synthetic_tasks`).
        held_out: share of the documents kept for evaluation, chosen by a hash of their bytes; of a
            single document its end.
        batch_size: rows of a batch, on all hosts together.
        length: tokens of a row.
        on_bad: "error" or "skip", for lines of a .jsonl file that cannot be read.
        packing: "stream" cuts rows from all documents joined: nothing is left out, and the state
            leaks from one document into the next of the same row, as in RWKV's own training;
            "documents" gives each a row of its own, cut or filled up to `length`: nothing leaks;
            "packed" puts the same documents together into full rows, in which none sees another.
            "auto" is "stream", except where a state is tuned on questions with answers: "packed"
            there, or "documents" where the run cannot read packed rows.
        order: "shuffled" by the seed, anew in every epoch, or "cubic", that of RWKV's own trainer,
            which has no seed and is the same in every epoch (for packing "stream").
        evaluation: what evaluation reads instead of the held-out part of `path`; all of it.
        as_bytes: takes files that are no text (tables, archives, pictures) or not UTF-8, and reads
            their bytes.
        encoding: of the text, such as "utf-16" or "gbk"; by default it is UTF-8.
        vocabulary: "world", "bytes", "bytes256" (raw), "ids" (numbers), a vocabulary file in
            World's format or a tokenizer.json; by default that of the checkpoint or of its size.
    """

    path: str = place("", several=True)
    held_out: float = number(0.05, 0, 1)
    batch_size: int = number(8, 1, MOST_COUNT)
    length: int = number(512, 1, MOST_COUNT)
    on_bad: OnBad = "error"
    packing: PackingChoice = "auto"
    order: Order = "shuffled"
    evaluation: str | None = place(None, several=True)
    as_bytes: bool = False
    encoding: str | None = optional()
    vocabulary: str | None = place(None)


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer; see `optim.optimizer`.

    Attributes:
        kind: "adamw" or "muon".
        learning_rate: the highest one, after the warm-up. Where a state is tuned on text and none
            is named, it is found (see `tuning.rates`); elsewhere it is 6e-4 by default.
        final_learning_rate: the one of the last step, under schedules that fall; by default 6e-5,
            or a tenth of `learning_rate` where that is less. It is a hundredth of a rate that was
            found, and cannot be named then.
        schedule: "cosine", "linear", "wsd" or "constant"; see `learning_rate_schedule`.
        warmup_steps: updates of the warm-up.
        weight_decay: of the groups that decay.
        clip: largest norm of the gradient; None for no limit.
        b1, b2, eps: of Adam.
        l2wrap: weight of RWKV's penalty on the largest logit.
        accumulate: pieces in which a batch is computed.
        decorrelate: of mode "pretrain": "none", "dbp" (decorrelated backpropagation of the blocks'
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
    """Returns the rate of the last step where none is named; below the highest one always."""
    assert learning_rate is not None
    return min(6e-5, 0.1 * learning_rate)


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
    variance: float = number(1.0, 0, MOST_WEIGHT)
    divergence: float = number(0.5, 0, MOST_WEIGHT)
    answers: float = number(1.0, 0, MOST_WEIGHT)
    least: int = number(1, 0, MOST_COUNT)
    most: int | None = number(None, 0, MOST_COUNT, absent=0)


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
    """Sample text, written at every evaluation after each of the prompts.

    Attributes:
        prompts: one text is generated after each.
        tokens: of a text at most.
        temperature: of the sampling; 0 is greedy.
        top_p: probability mass that is kept.
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
        init: checkpoint to start from; None for a new model of `model`'s sizes.
        state: tuned start states for eval.py, several with commas.
        start: what the modes that tune a start state begin with in place of zeros: the file of a
            state, or a text, which the model reads as a prompt.
        questions: .jsonl files of questions that eval.py answers, several with commas, judged by
            `test_time.verifier`.
        tasks: of lm-evaluation-harness that eval.py measures, several with commas.
        task_data: local files of these by the task's name, "train.jsonl,test.jsonl" or the test
            questions alone; of a group a folder.
        shots: examples before each question; by default what the task says.
        limit: questions of each task, or of `questions`, the first ones; by default all.
        bos: ids that are read before each context of a task, after the start state.
        model: fields of `RWKV7Config` for a new model, or changes (dtype, remat, implementation) to
            `init`; and `weights`, "int8" to hold the frozen matrices of `init` in 8 bits. The dtype
            "auto" is float32 on CPUs and bfloat16 elsewhere; a run that goes on keeps its own.
        steps: updates.
        seed: of initialisation and data order.
        log_every: steps between two lines of the log.
        save_every: steps between two checkpoints; by default only the end is saved.
        keep: newest checkpoints kept.
        keep_every: checkpoints whose step is a multiple of this are never removed.
        keep_best: how many of the best checkpoints are kept; evaluations save them.
        stop_after_bad: the run stops after so many updates in a row whose loss or gradient was not
            finite; such updates are skipped.
        mesh: how devices share a step: "auto", or sizes such as "data=2,fsdp=4".
        allow_nan: take a checkpoint that holds NaN or Inf.
        any_base: let eval.py take states that were tuned for other weights.
        profile_steps: "first:last", steps of which process 0 writes a profile.
        trackers: where metrics go besides the run's files: "tensorboard", "wandb".
        workdir: eval.py's folder for its report; train.py has it as a flag.
        backup: object store (gs://, s3:// or file://) for a copy of every checkpoint and of the
            run's files; a new machine continues from it. Shards of processes that see no common
            folder are written there.
        data, optimizer, tuning, upscaling, decorrelation, observer, test_time, evaluation, sample:
            groups of settings; see their classes.
    """

    # Names are keys in config files and in checkpoints of older runs; they cannot change.
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
        """Fills in the learning rates, and checks what the types cannot say."""
        self._fill_in_rates()
        check_model_sizes("config.model", self.model, loaded=True)
        check_model_sizes("config.observer.model", self.observer.model)
        profiles = profiled(self.profile_steps)
        if profiles and profiles[1] > self.steps:
            raise ValueError(
                f"`config.profile_steps` must lie within the {self.steps} of `config.steps`; got "
                f"{self.profile_steps!r}."
            )
        self._check_mesh()
        # The last 0 tokens of a text would be all of it.
        if 0 in self.evaluation.prompt_tokens:
            raise ValueError(
                "`config.evaluation.prompt_tokens` must be at least 1, or -1 for all; got 0."
            )
        self._check_lists()
        # Elsewhere it would silently do nothing.
        if self.optimizer.decorrelate != "none" and self.mode != "pretrain":
            raise ValueError(
                '`config.optimizer.decorrelate` must be "none" outside mode "pretrain", where '
                f"`config.tuning.decorrelate` has its place; got {self.optimizer.decorrelate!r}."
            )
        # The cubic order cuts rows at positions of one long stream; documents have none.
        if self.data.order == "cubic" and self.data.packing not in ("auto", "stream"):
            raise ValueError(
                '`config.data.order` must be "shuffled" where `config.data.packing` is '
                f'"{self.data.packing}"; got "cubic".'
            )
        refuse_unread_settings(self)
        self._check_states()
        check_packing(self.data.packing, self.mode, self.upscaling.dynamics)
        rows = self.data.batch_size
        source = "`config.data.batch_size`"
        if self._draws_its_rows:
            rows = self.test_time.prompts * self.test_time.group
            source = "`config.test_time.prompts` x `config.test_time.group`"
        pieces = self.optimizer.accumulate
        if rows < 1 or pieces < 1 or rows % pieces:
            raise ValueError(
                f"{source} must be a multiple of `config.optimizer.accumulate`; "
                f"got {rows} and {pieces}."
            )

    def _fill_in_rates(self) -> None:
        """Gives the learning rates their defaults where they are not to be found by a search."""
        if self.finds_rate:
            if not self.tuning.rates:
                raise ValueError(
                    "`config.tuning.rates` must hold learning rates to try, or "
                    "`config.optimizer.learning_rate` name one; got none."
                )
            final = self.optimizer.final_learning_rate
            if final is not None:
                raise ValueError(
                    "`config.optimizer.final_learning_rate` must be left out where the learning "
                    "rate is found, whose hundredth it is, or "
                    f"`config.optimizer.learning_rate` be named too; got {final:g}."
                )
            return
        optimizer = self.optimizer
        if optimizer.learning_rate is None:
            optimizer = dataclasses.replace(optimizer, learning_rate=6e-4)
        if optimizer.final_learning_rate is None:
            final = default_final_rate(optimizer.learning_rate)
            optimizer = dataclasses.replace(optimizer, final_learning_rate=final)
        # The class is frozen for everybody else.
        object.__setattr__(self, "optimizer", optimizer)

    @property
    def packing_of_answers(self) -> Packing:
        """What `data.packing` "auto" is for questions with answers."""
        implementation = self.model.get("implementation")
        return packing_of_answers(self.mode, self.upscaling.dynamics, implementation)

    @property
    def finds_rate(self) -> bool:
        """Whether the run finds its learning rate: it tunes states on text, and none is named."""
        tunes = self.mode in ("state", "upscaled_state")
        return tunes and self.optimizer.learning_rate is None

    def _check_states(self) -> None:
        """Checks that the texts of several states are named in one place."""
        if self.tuning.states is not None and self.data.path:
            raise ValueError(
                "`config.data.path` must be empty where `config.tuning.states` names the texts; "
                f"got {self.data.path!r}."
            )

    def _check_mesh(self) -> None:
        """Checks the sizes of a mesh, and that it does not share heads where it shares sets."""
        sizes = parse_sizes(self.mesh, "`config.mesh`")
        if isinstance(sizes, str) or sizes.get(TENSOR, 1) == 1:
            return
        what = None
        if self.tuning.states is not None:
            what = "`config.tuning.states` names several"
        elif self.finds_rate:
            what = "a learning rate is searched: name one, `config.optimizer.learning_rate`"
        if what:
            raise ValueError(
                f"`config.mesh` must have no tensor axis where {what}; got {self.mesh!r}."
            )

    def _check_lists(self) -> None:
        """Checks that no list of names has an empty entry, before anything is read."""
        lists = {
            "data.path": self.data.path,
            "data.evaluation": self.data.evaluation,
            "tuning.anchor_path": self.tuning.anchor_path,
            "evaluation.retention": self.evaluation.retention,
            "state": self.state,
            "questions": self.questions,
        }
        for name, text in lists.items():
            split_paths(text or "", f"`config.{name}`")
        self._check_tasks()
        for tracker in self.trackers:
            if not isinstance(tracker, str) or not tracker.strip():
                raise ValueError(
                    f"`config.trackers` must hold names of trackers; got {self.trackers!r}."
                )

    def _check_tasks(self) -> None:
        """Checks the names of tasks and of their files, before anything is read."""
        names = self.task_names
        for task, files in self.task_data.items():
            name = f"config.task_data.{task}"
            if not isinstance(files, str) or not files:
                raise ValueError(
                    f"`{name}` must be train.jsonl,test.jsonl or test.jsonl, or the folder of a "
                    f"group; got {shown(files)}."
                )
            for file in split_paths(files, f"`{name}`"):
                local_path(file, f"`{name}`")
            if task not in names:
                raise ValueError(
                    f"`{name}` must be of a task in `config.tasks`; got {self.tasks!r}."
                )

    @property
    def task_names(self) -> list[str]:
        """The tasks of lm-evaluation-harness."""
        return list(split_list(self.tasks, "`config.tasks`"))

    @property
    def task_files(self) -> dict[str, list[str]]:
        """The local files of tasks, by the task's name."""
        files = {}
        for task, text in self.task_data.items():
            files[task] = list(split_paths(text, f"`config.task_data.{task}`"))
        return files

    @property
    def state_paths(self) -> list[str]:
        """The files of the tuned start states."""
        return list(split_paths(self.state, "`config.state`"))

    @property
    def _draws_its_rows(self) -> bool:
        """Whether the model itself writes the rows of a step."""
        return self.mode == "test_time" and self.test_time.method in ("grpo", "expert")

    @property
    def rows_per_step(self) -> int:
        """The rows that a step computes at once."""
        # What the model itself writes is one batch a step; everything else is cut into batches.
        if self._draws_its_rows:
            return self.test_time.prompts * self.test_time.group
        return self.data.batch_size // self.optimizer.accumulate

    @property
    def untuned(self) -> str:
        """What a state is tuned from, as messages name it."""
        return "no state" if self.start is None else "the state of `config.start`"

    @property
    def kept_best(self) -> int:
        """How many best checkpoints are kept; with patience at least one, to go back to."""
        goes_back = bool(self.evaluation.patience)
        # A state that is good enough waits, at its best step, for the others of its run.
        if self.tuning.states is not None and self.evaluation.enough is not None:
            goes_back = True
        return max(self.keep_best, int(goes_back))


def read_settings(values: Mapping[str, Any]) -> Settings:
    """Reads the settings that a nested mapping holds; keys left out take their defaults.

    Raises:
        ValueError: an unknown key (the message names the nearest known one), a value of the wrong
            type, or one that is not allowed.
    """
    check_names(values, setting_types(Settings))
    return from_mapping(Settings, values, "config")
