"""Evaluators of a run: how well a model predicts held-out rows, by the name of the metric."""

import math

import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.evaluation.metric import Metric, Metrics, log_name
from rwkv7_jax.evaluation.scoring import Answers, frequency_nats, target_bytes
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.runs.held_out_rows import HeldOutRows


class PredictionEvaluator:
    """Measures how well rows are predicted: bits per byte of text, accuracy of a task's answers."""

    def __init__(self, name: str, model: RWKV7, rows: HeldOutRows):
        """Stores the model and the rows.

        Args:
            name: the first part of the metric's name, such as "held_out".
            model: the shell of the weights that will be measured.
            rows: the same ones in all evaluations of a run.
        """
        self._name = name
        self._model = model
        self._rows = rows

    @property
    def metric_name(self) -> str:
        """The name of the metric that a call measures."""
        kind = "accuracy" if self._rows.is_task else "bits_per_byte"
        return log_name(self._name, kind)

    def __call__(self, weights: Params, start: RWKV7State) -> Metrics:
        """Measures a model and its start state."""
        found = self._rows.measure(self._model, weights, start)
        if isinstance(found, Answers):
            return {self.metric_name: Metric.of(found.accuracy, "accuracy")}
        return {self.metric_name: Metric.of(found.bits_per_byte, "bits_per_byte")}

    def loss(self, weights: Params, start: RWKV7State, *, windows: int) -> Metrics:
        """Measures the loss on some of the rows: bits per byte of text, nats of a task's answers.

        Args:
            weights: of the model.
            start: its start state.
            windows: how many rows are read.
        """
        found = self._rows.some(windows).measure(self._model, weights, start)
        if isinstance(found, Answers):
            # Not the accuracy: of few answers it hardly tells two rates apart.
            return {log_name(self._name, "nats"): Metric.of(found.nats, "nats")}
        return {self.metric_name: Metric.of(found.bits_per_byte, "bits_per_byte")}

    def guess(self, *, windows: int) -> float:
        """Computes `loss` for guessing by how often each token occurs in the same rows."""
        rows = self._rows.some(windows)
        nats = frequency_nats(rows.batch)
        if rows.is_task:
            return nats
        size = float(np.sum(target_bytes(rows.batch, rows.tokenizer)))
        bits = nats * float(np.sum(np.asarray(rows.batch.mask))) / math.log(2)
        return bits / size if size else math.nan
