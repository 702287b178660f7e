"""Evaluators of a run: how well a model predicts held-out rows, by the name of the metric."""

import math

import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.choices import Packing
from rwkv7_jax.data.sources import TaskSource, parse_sources
from rwkv7_jax.evaluation.metric import Metric, Metrics, log_name
from rwkv7_jax.evaluation.scoring import (
    frequency_nats,
    score,
    score_answers,
    target_bytes,
)
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.runs.datasets import held_out, held_out_source
from rwkv7_jax.runs.settings import DataSettings, EvaluationSettings
from rwkv7_jax.text.tokenizer import Tokenizer


class PredictionEvaluator:
    """Measures how well rows are predicted: bits per byte of text, accuracy of a task's answers."""

    def __init__(
        self,
        name: str,
        model: RWKV7,
        tokenizer: Tokenizer,
        *,
        data: DataSettings,
        evaluation: EvaluationSettings,
        seed: int,
        answers: Packing = "stream",
        path: str | None = None,
    ):
        """Reads the rows.

        Args:
            name: the first part of the metric's name, such as "held_out".
            model: the shell of the weights that will be measured.
            tokenizer: of its vocabulary.
            data: the group of settings.
            evaluation: says how many rows and how long.
            seed: of synthetic tasks.
            answers: what packing "auto" is for questions with answers.
            path: what to read; None for the run's own held-out data.
        """
        self._name = name
        self._model = model
        self._tokenizer = tokenizer
        # Read once: all evaluations of a run have to measure on the same rows.
        self._batch = held_out(
            data, evaluation, tokenizer, seed=seed, answers=answers, path=path
        )
        self._is_task = isinstance(held_out_source(data, path), TaskSource)

    @property
    def metric_name(self) -> str:
        """The name of the metric that a call measures."""
        return log_name(self._name, "accuracy" if self._is_task else "bits_per_byte")

    def __call__(self, weights: Params, start: RWKV7State) -> Metrics:
        """Measures a model and its start state."""
        if self._is_task:
            answers = score_answers(self._model, weights, start, self._batch)
            return {self.metric_name: Metric.of(answers.accuracy, "accuracy")}
        return self._bits_per_byte(weights, start, self._batch)

    def loss(self, weights: Params, start: RWKV7State, *, windows: int) -> Metrics:
        """Measures the loss on some of the rows: bits per byte of text, nats of a task's answers.

        Args:
            weights: of the model.
            start: its start state.
            windows: how many rows are read.
        """
        batch = self._some_rows(windows)
        if not self._is_task:
            return self._bits_per_byte(weights, start, batch)
        # Not the accuracy: of few answers it hardly tells two rates apart.
        answers = score_answers(self._model, weights, start, batch, rows=windows)
        return {log_name(self._name, "nats"): Metric.of(answers.nats, "nats")}

    def guess(self, *, windows: int) -> float:
        """Computes `loss` for guessing by how often each token occurs in the same rows."""
        batch = self._some_rows(windows)
        nats = frequency_nats(batch)
        if self._is_task:
            return nats
        size = float(np.sum(target_bytes(batch, self._tokenizer)))
        bits = nats * float(np.sum(np.asarray(batch.mask))) / math.log(2)
        return bits / size if size else math.nan

    def _some_rows(self, windows: int) -> Batch:
        """Takes some of the rows, spread over all of them."""
        apart = max(len(self._batch.tokens) // windows, 1)
        return self._batch.select_rows(slice(0, apart * windows, apart))

    def _bits_per_byte(
        self, weights: Params, start: RWKV7State, batch: Batch
    ) -> Metrics:
        text = score(self._model, weights, start, batch, self._tokenizer)
        bits = Metric.of(text.bits_per_byte, "bits_per_byte")
        return {self.metric_name: bits}


def retention_paths(retention: str) -> dict[str, str]:
    """Splits `config.evaluation.retention` into paths to measure, by the names of their metrics.

    Each task of a list such as "task:dictionary,task:mapping" is measured by itself, under the
    task's name; all other text is measured together, under "retention".
    """
    # Tasks have accuracies that would hide each other in a mean; text has one loss.
    tasks, texts = parse_sources(retention, "`config.evaluation.retention`")
    paths = {task.name: str(task) for task in tasks}
    if texts.paths:
        paths["retention"] = str(texts)
    return paths
