"""Evaluators of a run: how well a model predicts held-out rows, by metric name."""

import math

import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.evaluation.metric import Metric, Metrics, log_name
from rwkv7_jax.evaluation.scoring import Answers, frequency_nats, target_bytes
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.runs.held_out_rows import HeldOutRows


class PredictionEvaluator:
    """An evaluator on held-out rows: bits per byte for text, accuracy for a task's answers."""

    def __init__(self, name: str, model: RWKV7, rows: HeldOutRows):
        """Stores the model and the rows.

        Args:
            name: the first part of the metric's name, such as "held_out".
            model: the model of the weights to measure.
            rows: the held-out rows, the same in all evaluations of a run.
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
        """Measures the loss on some rows: bits per byte for text, nats for a task's answers.

        Args:
            weights: the weights of the model.
            start: the start state.
            windows: the number of rows.
        """
        found = self._rows.some(windows).measure(self._model, weights, start)
        if isinstance(found, Answers):
            # Not the accuracy: with few answers it can hardly distinguish two learning rates.
            return {log_name(self._name, "nats"): Metric.of(found.nats, "nats")}
        return {self.metric_name: Metric.of(found.bits_per_byte, "bits_per_byte")}

    def guess(self, *, windows: int) -> float:
        """Computes `loss` for a guess from the token frequencies in the same rows."""
        rows = self._rows.some(windows)
        nats = frequency_nats(rows.batch)
        if rows.is_task:
            return nats
        size = float(np.sum(target_bytes(rows.batch, rows.tokenizer)))
        bits = nats * float(np.sum(np.asarray(rows.batch.mask))) / math.log(2)
        return bits / size if size else math.nan
