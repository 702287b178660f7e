"""The mode that trains an observer of a frozen teacher."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import model_hash
from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.evaluation.metric import Metric, Metrics, log_name
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.observer.evaluation import evaluate_handover
from rwkv7_jax.observer.files import save_observer
from rwkv7_jax.observer.loss import observer_loss
from rwkv7_jax.observer.observer import Observer, init_observer, propose, state_moments
from rwkv7_jax.observer.prompt_splits import add_prompt_splits, count_answers
from rwkv7_jax.runs.datasets import TrainingData, held_out
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.settled_settings import AUTO
from rwkv7_jax.training.costs import tree_size

# The start states whose continuations are measured, with their names in logs: the observer's
# proposal, the teacher's own state after the prompt, and zeros.
_LOG_NAMES = {"proposed": "proposal", "wkv": "own_state", "zero": "no_state"}

_RESULT = "observer"


class ObserverMode(TrainingMode):
    """Trains a small model to propose start states for the frozen teacher in `init`.

    Samples come from the teacher without a start state.
    """

    result_names = (_RESULT,)

    frozen: Params

    def set_up(self) -> None:
        """Loads the teacher, opens the data and makes the loss."""
        settings = self.settings
        self._check_positions("config.data.length", settings.data.length)
        self._check_positions("config.evaluation.length", settings.evaluation.length)
        self.load_frozen("whose states are observed")
        teacher = self.model.config
        self._observer = Observer(RWKV7(self._observer_config(teacher)), teacher)
        self.loss = observer_loss(
            self._observer,
            self.model,
            self.frozen,
            variance=settings.observer.variance,
            divergence=settings.observer.divergence,
            answers=settings.observer.answers,
        )
        self.open_data()

    def read_data(self) -> None:
        """Reads the data, and splits the held-out rows into prompts and continuations."""
        self.data = TrainingData(self.settings, self.tokenizer)
        rows = held_out(self.settings, self.tokenizer)
        # All evaluations of a run measure the same continuations.
        self._rows = self._split_prompts(rows, 0)
        if not count_answers(self._rows):
            raise ValueError(
                "`config.observer.most` must leave a target that counts after the prompts of the "
                "evaluation rows; none is left. Take shorter prompts, or a longer "
                "`config.evaluation.length`."
            )

    def _check_positions(self, setting: str, length: int) -> None:
        """Checks that the range of prompt lengths fits into rows of a length."""
        observer = self.settings.observer
        # The last target of a row belongs to its continuation.
        most = observer.most or length - 1
        if not observer.least <= most <= length:
            raise ValueError(
                "`config.observer.least` and `config.observer.most` must be in order and at most "
                f"`{setting}`, {length}; got {observer.least} and {most}."
            )

    def _observer_config(self, teacher: RWKV7Config) -> RWKV7Config:
        """Sizes the observer: by default one layer of half the teacher's width."""
        changes = dict(self.settings.observer.model)
        # "auto" takes the teacher's dtype, below.
        if changes.get("dtype") == AUTO:
            del changes["dtype"]
        if "vocab_size" in changes:
            raise ValueError(
                "`config.observer.model.vocab_size` must be left out: it is the teacher's."
            )
        sizes = {
            "vocab_size": teacher.vocab_size,
            "num_layers": 1,
            "width": teacher.width // 2,
            "head_size": teacher.head_size,
            "dtype": teacher.dtype,
        }
        # The user's settings replace the defaults.
        sizes |= changes
        if "width" not in changes and sizes["width"] % sizes["head_size"]:
            raise ValueError(
                "`config.observer.model.width` must be set to a multiple of the head size "
                f"{sizes['head_size']}: half of the teacher's width, {teacher.width}, is not one."
            )
        with prefix_errors("config.observer.model"):
            return RWKV7Config(**sizes)

    def _split_prompts(self, batch: Batch, step: int, first: int = 0) -> Batch:
        """Adds the positions at which prompts end to a batch, whose first row is row `first`."""
        settings = self.settings.observer
        # The last target of a row belongs to its continuation.
        most = settings.most or batch.tokens.shape[1] - 2
        return add_prompt_splits(
            batch,
            self.settings.seed,
            step,
            least=settings.least,
            most=most,
            first=first,
        )

    def make_params(self) -> Params:
        """Makes the weights of a new observer, which proposes the teacher's mean state."""
        text = self.data.calibration_text(self.settings.upscaling.rows)
        bias = state_moments(self.model, self.frozen, text).mean
        return self._init_observer(bias)

    def _init_observer(self, bias: Float[Array, "L H Nv Nk"] | None = None) -> Params:
        config = self._observer.model.config
        key = jax.random.key(self.settings.seed)
        # Only the weights: `set_up` has made the observer, which the loss needs.
        return init_observer(config, self.model.config, key, bias=bias)[1]

    def _describe_params(self) -> Params:
        """Returns shapes and dtypes, without measuring the teacher's states."""
        return jax.eval_shape(self._init_observer)

    def trained_count(self, params: Params) -> int:
        """Counts the observer's weights."""
        return tree_size(params)

    def read_batches(self, start_step: int, rows: slice) -> Iterator[Batch]:
        """Makes batches of the data, with the positions at which prompts end."""
        batches = super().read_batches(start_step, rows)
        # The splits depend on the step, so that a resumed run has the same ones.
        for step, batch in enumerate(batches, start_step):
            yield self._split_prompts(batch, step, rows.start or 0)

    def held_out_names(self) -> tuple[str, ...]:
        """Returns the names of the accuracy and the loss after each start state."""
        names = []
        for subject in _LOG_NAMES.values():
            names += [log_name(subject, "accuracy"), log_name(subject, "nats")]
        return tuple(names)

    def held_out_metrics(self, params: Params) -> Metrics:
        """Measures the teacher on held-out continuations, from each start state."""
        prompts = np.asarray(self._rows.inputs)
        proposal = propose(self._observer, params, prompts, self._rows.split)
        handover = evaluate_handover(self.model, self.frozen, proposal, self._rows)
        metrics: Metrics = {}
        for name, subject in _LOG_NAMES.items():
            answers = handover[name]
            metrics[log_name(subject, "accuracy")] = Metric.of(
                answers.accuracy, "accuracy"
            )
            metrics[log_name(subject, "nats")] = Metric.of(answers.nats, "nats")
        return metrics

    def save(
        self, folder: Path, params: Params, *, without: Sequence[str] = ()
    ) -> Path:
        """Writes the observer and returns the path of its folder."""
        path = folder / _RESULT
        info = {"base_model": model_hash(self.frozen, self.model.config)}
        save_observer(path, self._observer, params, info=info)
        return path
