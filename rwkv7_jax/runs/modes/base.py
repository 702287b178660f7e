"""The interface between the loop of train.py and the training modes."""

import abc
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import optax
from jax.sharding import Mesh

from pallas_kernels.platforms import target_platform
from rwkv7_jax import sharding
from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.evaluation.metric import Metrics
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state
from rwkv7_jax.optim.decorrelation import Decorrelator
from rwkv7_jax.runs.datasets import TrainingData
from rwkv7_jax.runs.early_stopping import Progress, check_measure
from rwkv7_jax.runs.evaluators import PredictionEvaluator
from rwkv7_jax.runs.held_out_rows import HeldOutRows, retention_paths
from rwkv7_jax.runs.input_pipeline import BatchSource, PrefetchedBatches
from rwkv7_jax.runs.modes.model_setup import load_or_init, tokenizer_of
from rwkv7_jax.runs.modes.scheduled_optimizer import (
    RateAt,
    schedule_and_optimizer,
    with_rate,
)
from rwkv7_jax.runs.process_group import group_of_mesh
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.sharding import own_rows
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.training.costs import (
    Memory,
    flops_per_token,
    mean_weight_bytes,
    training_memory,
)
from rwkv7_jax.training.losses import Loss
from rwkv7_jax.training.train_step import TrainState, TrainStep, make_train_step


class TrainingMode(abc.ABC):
    """The trainable parameters of a run, their loss, their batches and their metrics.

    A subclass loads its model and its data in `set_up`, and makes its loss there or in `prepare`.
    Methods that it does not define are those of a run that trains weights on a dataset.

    Attributes:
        settings: settings of the run.
        folder: the run directory.
        model: the network that is trained or whose state is tuned.
        tokenizer: the model's tokenizer.
        mesh: the devices of this process that hold the weights; None for a single device.
        frozen: weights that the run never changes; None if weights are trained.
        data: training data of the run, from `open_data`.
        loss: loss of the trainable parameters and a batch.
        found_rate: learning rate that a search found; None if the settings name it.
        decorrelator: wraps the run's optimizer.
        abstract_params: shapes and dtypes of the trainable parameters.
    """

    # The parameters with gradients, if a step is one pass of one model. None for modes with other
    # steps, whose FLOPs and memory are not estimated.
    gradients_of: ClassVar[Literal["weights", "state"] | None] = None

    # The files or folders in the run directory that hold the result.
    result_names: ClassVar[tuple[str, ...]]

    # Updates per step of the run; the learning rate schedule counts updates.
    updates_per_step: int = 1

    # Whether to evaluate before the first step, as well as after the last one.
    measures_start: ClassVar[bool] = True

    # Whether the result is a tuned state, which is not saved if it is worse than no tuning.
    tunes_state: ClassVar[bool] = False

    model: RWKV7
    tokenizer: Tokenizer
    frozen: Params | None = None
    data: TrainingData
    loss: Loss
    found_rate: float | None = None
    decorrelator: Decorrelator = Decorrelator(wrap=lambda tx: tx)
    abstract_params: Any

    _held_out: PredictionEvaluator

    # Parameters that are already made. They are handed over or freed before the first step, because
    # a reference here would cost a copy.
    _initial: Any = None

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        *,
        base: tuple[RWKV7, Params] | None = None,
        mesh: Mesh | None = None,
    ):
        """Loads the model and the data.

        Args:
            settings: settings of the run.
            folder: the run directory, for files besides the result.
            base: the model of `config.init` and its weights, if they are already loaded.
            mesh: the devices of this process that hold the weights; None for a single device.

        Raises:
            ValueError: the mode rejects the settings or the data.
        """
        self.settings = settings
        self.folder = folder
        self.mesh = mesh
        self._base = base
        self.set_up()
        # The evaluators need the model and the tokenizer of `set_up`.
        self._retention = self.retention_evaluators()
        self._check_evaluations()
        with report_wait("the initial state and its statistics"):
            self.prepare()

    @abc.abstractmethod
    def set_up(self) -> None:
        """Loads the model and the data; called once, by the constructor."""

    def load_frozen(self, purpose: str) -> None:
        """Loads the model of `config.init`, whose weights the run never changes, and its tokenizer.

        Args:
            purpose: purpose of the model, the end of the message if no checkpoint is named.

        Raises:
            ValueError: no checkpoint is named.
        """
        if self.settings.init is None:
            raise ValueError(f"`config.init` must name the checkpoint {purpose}.")
        loaded = self._base or load_or_init(self.settings, self.mesh)
        self.model, self.frozen = loaded
        self.tokenizer = tokenizer_of(self.settings, self.model.config)

    def open_data(self) -> None:
        """Opens the data, after `set_up` has loaded the model; if one process fails, all do.

        The next common call of processes that share the weights is a collective of XLA, which a
        process that has failed would break without a reason.
        """
        group_of_mesh(self.mesh).run_in_all(self.read_data)

    def read_data(self) -> None:
        """Reads the run's data and its held-out rows, without any call to other processes."""
        self.data = TrainingData(self.settings, self.tokenizer)
        self._held_out = self.prediction_evaluator("held_out")

    def prepare(self) -> None:
        """Does what may take long, after the checks; here it only describes the parameters."""
        # Now, because the parameters may be handed over later.
        self.abstract_params = self._describe_params()

    @abc.abstractmethod
    def make_params(self) -> Any:
        """Makes the initial parameters of a new run; every call gives bit-exact equal values."""

    @abc.abstractmethod
    def trained_count(self, params: Any) -> int:
        """Counts the trained numbers."""

    def weights(self, params: Any) -> Params:
        """Returns the weights of the model that evaluations measure."""
        return params if self.frozen is None else self.frozen

    def start_state(self, params: Any) -> RWKV7State:
        """Returns the start state, of batch 1, that evaluations measure."""
        return init_state(self.model.config)

    @abc.abstractmethod
    def save(self, folder: Path, params: Any, *, without: Sequence[str] = ()) -> Path:
        """Writes the result of the run into a folder and returns its path.

        Args:
            folder: the run directory.
            params: final parameters of the run.
            without: names of states not to write, for a run with several.
        """

    def state_files(self, folder: Path) -> dict[str, Path]:
        """Returns the files of tuned states by name; a single state has the name ""."""
        return {}

    def member(self, name: str) -> "TrainingMode":
        """Returns the mode of the state with a name; for "", the mode itself."""
        return self

    def batches(self, start_step: int, mesh: Mesh | None) -> BatchSource:
        """Opens the source of the batches, from a step on; each process makes its own rows.

        Args:
            start_step: step of the first batch, from 0.
            mesh: the devices that share the rows of a batch.

        Raises:
            ValueError: the data is too small for a batch.
        """
        count = self.settings.data.batch_size
        batches = self.read_batches(start_step, own_rows(mesh, count))
        return PrefetchedBatches(batches, mesh, rows=count)

    def read_batches(self, start_step: int, rows: slice) -> Iterator[Batch]:
        """Makes some rows of each batch of the data.

        Args:
            start_step: step of the first batch, from 0.
            rows: slice of the global batch.
        """
        return self.data.batches(start_step=start_step, rows=rows)

    def held_out_metrics(self, params: Any) -> Metrics:
        """Measures the parameters on the run's held-out data; returns metrics by name."""
        return self._held_out(self.weights(params), self.start_state(params))

    def held_out_names(self) -> tuple[str, ...]:
        """Returns the names of `held_out_metrics`."""
        return (self._held_out.metric_name,)

    def input_digests(self) -> dict[str, str]:
        """Hashes the inputs of the run besides weights; a resumed run must have equal inputs."""
        return self.data.digests()

    def describe_data(self) -> str:
        """Describes the data and its size, for the terminal."""
        return self.data.describe()

    def optimizer(self) -> tuple[RateAt, optax.GradientTransformation]:
        """Makes the learning rate schedule, by the number of updates, and the optimizer."""
        settings = self.settings.optimizer
        if self.found_rate is not None:
            settings = with_rate(settings, self.found_rate)
        rate_at, tx = schedule_and_optimizer(
            settings, total_steps=self.updates_per_step * self.settings.steps
        )
        return rate_at, self.decorrelator.wrap(tx)

    def train_state(self, params: Any, tx: optax.GradientTransformation) -> TrainState:
        """Makes the training state before the first step."""
        return TrainState.create(params, tx)

    def train_step(
        self, tx: optax.GradientTransformation, mesh: Mesh | None
    ) -> TrainStep:
        """Makes the step of the run."""
        return self.update_step(tx, mesh)

    def example_batch(self) -> Batch:
        """Returns a batch with the shapes of a step's batch, for ahead-of-time compilation."""
        with contextlib.closing(self.batches(0, None)) as source:
            placed = source.batch(0, self.make_params)
        assert placed is not None
        return placed.host

    def update_step(
        self, tx: optax.GradientTransformation, mesh: Mesh | None
    ) -> TrainStep:
        """Makes the compiled update; a step of the run makes one or more of them."""
        return make_train_step(
            self.loss,
            tx,
            statistics=self.decorrelator.statistics,
            accumulate=self.settings.optimizer.accumulate,
            mesh=mesh,
        )

    def new_progress(self) -> Progress:
        """Makes the progress of a run before its first step."""
        return Progress()

    def step_metrics(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Returns a step's metrics by column name.

        Args:
            metrics: metrics of the step, on the host.
        """
        return {name: float(value) for name, value in metrics.items()}

    @property
    def tokens_per_step(self) -> int | None:
        """The tokens that a step reads; None if not known in advance."""
        return self.settings.data.batch_size * self.settings.data.length

    @property
    def flops_per_token(self) -> float | None:
        """The FLOPs of a step per token; None if they are not estimated."""
        # A step with an anchor also reads the anchor, with the base and the tuned model.
        if self.gradients_of is None or self.settings.tuning.anchor:
            return None
        flops = flops_per_token(self.model.config)
        return flops.training if self.gradients_of == "weights" else flops.state

    def init_params(self) -> Any:
        """Returns the initial parameters of a new run without keeping a reference."""
        initial = self._initial
        # The caller donates them, so a second call has to make new ones.
        self._initial = None
        return self.make_params() if initial is None else initial

    def keep_initial(self, params: Any) -> None:
        """Keeps unchanged parameters of `init_params` for its next call."""
        self._initial = params

    def release_initial(self) -> None:
        """Frees the parameters of `set_up` that were not handed over."""
        self._initial = None

    def _describe_params(self) -> Any:
        """Returns shapes and dtypes of the parameters; traces if none have been made."""
        if self._initial is None:
            return jax.eval_shape(self.make_params)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._initial
        )

    def memory_estimate(self, mesh: Mesh | None = None) -> Memory | None:
        """Estimates a step's memory on one device; None for modes without an estimate.

        Args:
            mesh: the devices that share a step; None for a single device.
        """
        if self.gradients_of is None:
            return None
        sizes = sharding.sizes_of(mesh)
        rows = sharding.share_of_rows(self.settings.rows_per_step, sizes)
        return self.step_memory(rows, sizes)

    def step_memory(self, rows: int, sizes: Mapping[str, int]) -> Memory:
        """Estimates the memory of a step that is one pass of the mode's model.

        Args:
            rows: rows that one device computes at once.
            sizes: sizes of the mesh axes, by name.
        """
        assert self.gradients_of is not None
        accumulate = self.settings.optimizer.accumulate
        return training_memory(
            self.model.config,
            batch=rows * accumulate,
            length=self.own_length(sizes),
            trained=self.gradients_of,
            accumulate=accumulate,
            weight_bytes=mean_weight_bytes(self.frozen, self.model.config),
            platform=target_platform(),
            # An approximation: `tensor` divides neither the embedding nor most activations.
            shards=sizes.get(sharding.FSDP, 1) * sizes.get(sharding.TENSOR, 1),
        )

    def own_length(self, sizes: Mapping[str, int]) -> int:
        """Returns the tokens of a row on one device of a mesh with some sizes."""
        # A row over several devices is padded to pieces of equal length.
        return -(-self.settings.data.length // sizes.get(sharding.SEQUENCE, 1))

    def evaluate(self, params: Any) -> Metrics:
        """Measures the parameters on held-out data and on retention data.

        The held-out metrics come first. `config.evaluation.retention` adds one metric per task and
        one for its text.
        """
        metrics = self.held_out_metrics(params)
        for evaluator in self._retention:
            metrics |= evaluator(self.weights(params), self.start_state(params))
        return metrics

    def _check_evaluations(self) -> None:
        """Checks the settings of evaluations, before the first evaluation would fail.

        Raises:
            ValueError: the measure is unknown, or a prompt for samples has no ids.
        """
        retained = [one.metric_name for one in self._retention]
        names = [*self.held_out_names(), *retained]
        check_measure(self.settings.evaluation, names)
        for prompt in self.settings.sample.prompts:
            with prefix_errors("config.sample.prompts"):
                if not self.tokenizer.encode(prompt):
                    raise ValueError(f"a prompt must hold a token; got {prompt!r}.")

    def sample_texts(self, params: Any) -> Iterator[tuple[str, str]]:
        """Yields each prompt for samples and the generated text."""
        sample = self.settings.sample
        for prompt in sample.prompts:
            generation = generate(
                self.model,
                self.weights(params),
                self.tokenizer.encode(prompt),
                self.start_state(params),
                tokens=sample.tokens,
                temperature=sample.temperature,
                top_p=sample.top_p,
                # With the same key at every evaluation, samples differ only because of training.
                key=jax.random.key(self.settings.seed),
                stop_ids=self.tokenizer.stop_ids,
            )
            yield prompt, readable_text(self.tokenizer, generation.tokens[0])

    def retention_evaluators(self) -> list[PredictionEvaluator]:
        """Makes the evaluators on retention data."""
        paths = retention_paths(self.settings.evaluation.retention)
        return [self.prediction_evaluator(name, path) for name, path in paths.items()]

    def prediction_evaluator(
        self, name: str, path: str | None = None
    ) -> PredictionEvaluator:
        """Makes an evaluator on a path's text; without a path, on the run's held-out data."""
        rows = HeldOutRows.read(self.settings, self.tokenizer, path=path)
        return PredictionEvaluator(name, self.model, rows)


def readable_text(tokenizer: Tokenizer, ids: Iterable[Any]) -> str:
    """Decodes ids; an id without an entry in the vocabulary becomes, for instance, <7>."""
    pieces = []
    for number in ids:
        try:
            pieces.append(tokenizer.decode_bytes([int(number)]))
        except ValueError:
            pieces.append(f"<{int(number)}>".encode())
    return b"".join(pieces).decode("utf-8", errors="replace")
