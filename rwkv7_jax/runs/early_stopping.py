"""Early stopping and the best checkpoints: bookkeeping that is saved with every checkpoint.

A run that was killed therefore decides as an unbroken one does.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rwkv7_jax.evaluation.metric import Metric, logged_metric
from rwkv7_jax.runs.settings import EvaluationSettings


@dataclasses.dataclass(frozen=True)
class RunProgress:
    """The progress of a run, as its checkpoints hold it.

    Attributes:
        evaluated: the step of the last evaluation; -1 before the first.
        measure: the name of the metric that decides; "" before the first evaluation.
        waited: evaluations since the best one.
        best: pairs of the metric's value and its step, the best first; as many as are kept, and at
            least one.
        bad: updates in a row that were not finite.
    """

    # These names are keys in checkpoints.
    evaluated: int = -1
    measure: str = ""
    waited: int = 0
    best: tuple[tuple[float, int], ...] = ()
    bad: int = 0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "RunProgress":
        """Reads the fields that `dataclasses.asdict` gave and JSON stored."""
        best = tuple((value, step) for value, step in fields["best"])
        return cls(**{**fields, "best": best})

    def with_evaluation(
        self,
        step: int,
        metrics: Mapping[str, Metric],
        evaluation: EvaluationSettings,
        *,
        kept: int,
    ) -> "RunProgress":
        """Gives the progress after the evaluation of a step.

        Args:
            step: of the evaluation.
            metrics: of the evaluation, by name.
            evaluation: says which metric decides.
            kept: how many best steps are remembered.

        Raises:
            ValueError: the metric that decides is not among them.
        """
        name = deciding_metric(metrics, evaluation)
        metric = metrics.get(name)
        if metric is None or math.isnan(metric.value):
            return dataclasses.replace(
                self, evaluated=step, measure=name, waited=self.waited + 1
            )
        # Sorted upwards, so that the first pair is the best one.
        sign = -1 if metric.higher_is_better else 1
        # Of equal values the earlier step is the better one.
        ranked = sorted(
            [*self.best, (metric.value, step)],
            key=lambda pair: (sign * pair[0], pair[1]),
        )
        is_best = ranked[0][1] == step
        return dataclasses.replace(
            self,
            evaluated=step,
            measure=name,
            waited=0 if is_best else self.waited + 1,
            best=tuple(ranked[: max(kept, 1)]),
        )

    def best_steps(self, kept: int) -> tuple[int, ...]:
        """Lists the best steps, whose checkpoints are kept."""
        return tuple(step for _, step in self.best[:kept])

    def stop_reason(self, evaluation: EvaluationSettings) -> str | None:
        """Tells why the run ends before its last step; None if it does not."""
        if evaluation.patience and self.waited >= evaluation.patience:
            # `best` is empty where every value so far was NaN.
            value = math.nan
            step = 0
            if self.best:
                value, step = self.best[0]
            return f"no better than {value:.4g} of step {step} in {self.waited} evaluations"
        # A best value of an earlier evaluation has been compared with `enough` then.
        if evaluation.enough is None or not self.best or self.waited:
            return None
        # A checkpoint holds the metric's name and not its unit.
        metric = logged_metric(self.measure, self.best[0][0])
        if metric.higher_is_better:
            reached = metric.value >= evaluation.enough
        else:
            reached = metric.value <= evaluation.enough
        return f"{self.measure} reached {metric.value:.4g}" if reached else None


def deciding_metric(
    metrics: Mapping[str, Metric], evaluation: EvaluationSettings
) -> str:
    """Names the metric that decides: `config.evaluation.measure`, or the first; "" without any.

    Raises:
        ValueError: the named one is not among them.
    """
    if evaluation.measure and evaluation.measure not in metrics:
        raise ValueError(
            f"`config.evaluation.measure` must be one of {', '.join(metrics)}; "
            f"got {evaluation.measure!r}."
        )
    return evaluation.measure or next(iter(metrics), "")
