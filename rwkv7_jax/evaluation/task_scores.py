"""Scores of the same questions by several start states: values, differences and their errors."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

# The metric that every task has besides its own: of the right answers, or of the text.
BITS_PER_BYTE = "bits_per_byte"


@dataclasses.dataclass(frozen=True, eq=False)
class QuestionScores:
    """One metric, question by question.

    Attributes:
        totals: what each question adds: 1 where it is right, or the bits of its answer.
        weights: what the sum of these is divided by: 1 a question, or the bytes of its answer.
        questions: a hash of each question as the model read it.
    """

    totals: Float[np.ndarray, " Q"]
    weights: Float[np.ndarray, " Q"]
    questions: tuple[str, ...]

    @property
    def value(self) -> float:
        """The metric: a ratio of sums, so that short answers do not count more."""
        return _ratio(self.totals, self.weights)[0]

    @property
    def standard_error(self) -> float:
        """Of the value, over questions; NaN of a single one."""
        return _ratio(self.totals, self.weights)[1]

    def difference(self, base: "QuestionScores") -> tuple[float, float]:
        """Returns this value less that of `base`, and the standard error over pairs of scores.

        Questions that are hard for both change neither number, which two separate errors would not
        tell.

        Raises:
            ValueError: the two are not of the same questions.
        """
        if self.questions != base.questions:
            raise ValueError(
                "QuestionScores.difference: `base` must be of the same questions; "
                f"got {len(base.questions)} others."
            )
        return _ratio(self.totals - base.totals, self.weights)


# By task and metric.
TaskScores = Mapping[str, Mapping[str, QuestionScores]]


def _ratio(
    totals: Float[np.ndarray, " Q"], weights: Float[np.ndarray, " Q"]
) -> tuple[float, float]:
    """Returns a ratio of sums and its standard error; where weights are 1, those of a mean."""
    count = len(totals)
    ratio = totals.sum() / weights.sum()
    if count < 2:
        return float(ratio), math.nan
    residuals = totals - ratio * weights
    variance = (residuals**2).sum() * count / (count - 1)
    return float(ratio), float(math.sqrt(variance) / weights.sum())


def pooled(scores: Sequence[QuestionScores]) -> QuestionScores:
    """Joins the questions of several tasks, each of which counts the same."""
    questions: list[str] = []
    for score in scores:
        questions += score.questions
    return QuestionScores(
        np.concatenate([score.totals for score in scores]),
        np.concatenate([score.weights for score in scores]),
        tuple(questions),
    )


def score_table(task: str, rows: Mapping[str, TaskScores]) -> str:
    """Formats the scores of one task: a line a row, a pair of columns a metric.

    Args:
        task: its name.
        rows: scores by the rows' names; the first is the base that differences are against.
    """
    base = next(iter(rows.values()))[task]
    count = max(len(score.questions) for score in base.values())
    lines = [f"{f'{task} ({count:,})':<24}"]
    for metric in base:
        lines[0] += f"  {metric:>32}"
    for name, scores in rows.items():
        line = f"{name:<24}"
        for metric, score in scores[task].items():
            cell = f"{score.value:.4f} +-{score.standard_error:.4f}"
            if score is not base[metric]:
                difference, error = score.difference(base[metric])
                cell = f"{score.value:.4f} {difference:+.4f} +-{error:.4f}"
            line += f"  {cell:>32}"
        lines.append(line)
    return "\n".join(lines)


def scores_as_json(rows: Mapping[str, TaskScores]) -> dict[str, Any]:
    """Converts scores to what JSON can hold, by task, row and metric; NaN becomes None.

    Args:
        rows: scores by the rows' names; the first is the base that differences are against.
    """
    tasks: dict[str, Any] = {}
    base = next(iter(rows.values()))
    for task, base_metrics in base.items():
        tasks[task] = {}
        for name, scores in rows.items():
            tasks[task][name] = {
                metric: _score_as_json(score, base_metrics[metric])
                for metric, score in scores[task].items()
            }
    return tasks


def _score_as_json(score: QuestionScores, base: QuestionScores) -> dict[str, Any]:
    """Converts one metric, with its difference from the base where it is not the base itself."""
    cell: dict[str, Any] = {
        "value": score.value,
        "standard_error": _known(score.standard_error),
        "questions": len(score.questions),
    }
    if score is not base:
        difference, error = score.difference(base)
        cell["difference"] = difference
        cell["difference_error"] = _known(error)
    return cell


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
