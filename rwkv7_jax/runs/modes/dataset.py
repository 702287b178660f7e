"""The part of a mode that reads its batches from a dataset."""

from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.evaluation.metric import Metrics
from rwkv7_jax.runs.datasets import TrainingData
from rwkv7_jax.runs.evaluators import PredictionEvaluator
from rwkv7_jax.runs.input_pipeline import BatchSource, PrefetchedBatches
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.sharding import own_rows


class DatasetMode(TrainingMode):
    """A mode whose batches depend only on the run's data.

    Attributes:
        data: training data of the run.
    """

    data: TrainingData
    _held_out: PredictionEvaluator

    def open_data(self) -> None:
        """Opens the run's data and its held-out rows, after `set_up` has loaded the model."""
        self.data = TrainingData(self.settings, self.tokenizer)
        self._held_out = self.prediction_evaluator("held_out")

    def held_out_names(self) -> tuple[str, ...]:
        """Returns the name of the metric on the held-out rows."""
        return (self._held_out.metric_name,)

    def held_out_metrics(self, params: Any) -> Metrics:
        """Measures the model on the held-out rows."""
        return self._held_out(self.weights(params), self.start_state(params))

    def batches(self, start_step: int, mesh: Mesh | None) -> BatchSource:
        """Prefetches batches of the data; each process makes its own rows."""
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

    def input_digests(self) -> dict[str, str]:
        """Hashes the data."""
        return self.data.digests()

    def describe_data(self) -> str:
        """Describes the data and its size."""
        return self.data.describe()
