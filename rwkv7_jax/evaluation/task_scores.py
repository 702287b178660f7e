"""Scores of several start states on the same questions, with differences and standard errors."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rwkv7_jax.evaluation.ratio import (
    Ratio,
    difference_as_json,
    estimate_columns,
    estimate_head,
    known,
)

# The metric that every task has besides its own: of the correct answers, or of the text.
BITS_PER_BYTE = "bits_per_byte"

_NAME_WIDTH = 24


@dataclasses.dataclass(frozen=True, eq=False)
class QuestionScores(Ratio):
    """One metric, question by question.

    Attributes:
        totals: numerator of each question: 1 for a correct answer, or the bits of its answer.
        weights: denominator of each question: 1, or the bytes of its answer.
        questions: hash of each question as the model read it.
    """

    questions: tuple[str, ...]

    def difference(self, base: "QuestionScores") -> tuple[float, float]:
        """Returns this value minus that of `base`, and the standard error over pairs of scores.

        Raises:
            ValueError: the two do not cover the same questions.
        """
        if self.questions != base.questions:
            raise ValueError(
                "QuestionScores.difference: `base` must have the same questions; "
                f"got {len(base.questions)} others."
            )
        return super().difference(base)


# Scores by task and metric.
TaskScores = Mapping[str, Mapping[str, QuestionScores]]


def pooled(scores: Sequence[QuestionScores]) -> QuestionScores:
    """Joins the questions of several tasks; every question has the same weight."""
    questions: list[str] = []
    for score in scores:
        questions += score.questions
    return QuestionScores(
        np.concatenate([score.totals for score in scores]),
        np.concatenate([score.weights for score in scores]),
        tuple(questions),
    )


def score_table(task: str, rows: Mapping[str, TaskScores]) -> str:
    """Formats the scores of one task: one line per start state, two columns per metric.

    A value and its difference from the base have separate standard errors. Only metrics that all
    rows have are shown.

    Args:
        task: name of the task.
        rows: scores by the names of the rows; the first row is the base of the differences.
    """
    base = next(iter(rows.values()))[task]
    count = max(len(score.questions) for score in base.values())
    width = max(_NAME_WIDTH, *(len(name) for name in rows))
    lines = [f"{f'{task} ({count:,})':<{width}}"]
    metrics = _common_metrics(task, rows)
    for metric in metrics:
        lines[0] += estimate_head(metric)
    for name, scores in rows.items():
        line = f"{name:<{width}}"
        for metric in metrics:
            score = scores[task][metric]
            line += estimate_columns(score.value, score, base[metric])
        lines.append(line.rstrip())
    return "\n".join(lines)


def _common_metrics(task: str, rows: Mapping[str, TaskScores]) -> list[str]:
    """Lists the metrics of a task that all rows have, in the order of the first row.

    Rows may differ: whether a metric of the harness is a mean over questions is known from its
    values.
    """
    tables = [scores[task] for scores in rows.values()]
    return [metric for metric in tables[0] if all(metric in table for table in tables)]


def scores_as_json(rows: Mapping[str, TaskScores]) -> dict[str, Any]:
    """Converts scores for JSON, by task, row and metric; NaN and infinities become None.

    Only metrics that all rows have are converted.

    Args:
        rows: scores by the names of the rows; the first row is the base of the differences.
    """
    tasks: dict[str, Any] = {}
    base = next(iter(rows.values()))
    for task, base_metrics in base.items():
        metrics = _common_metrics(task, rows)
        tasks[task] = {}
        for name, scores in rows.items():
            tasks[task][name] = {
                metric: _score_as_json(scores[task][metric], base_metrics[metric])
                for metric in metrics
            }
    return tasks


def _score_as_json(score: QuestionScores, base: QuestionScores) -> dict[str, Any]:
    """Converts one metric, with its difference from the base unless it is the base itself."""
    cell: dict[str, Any] = {
        "value": known(score.value),
        "standard_error": known(score.standard_error),
        "questions": len(score.questions),
    }
    return cell | difference_as_json(score, base)
