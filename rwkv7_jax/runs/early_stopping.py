"""What a run knows of itself beside what it trains: evaluations, updates gone wrong.

All of it is in every checkpoint, so that a run which was killed decides as the unbroken one does.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rwkv7_jax.runs.settings import EvaluationSettings

# How the names of measures end of which less is better; of others more is.
_LESS_IS_BETTER = ("bits_per_byte", "nats", "perplexity")


@dataclasses.dataclass(frozen=True)
class RunProgress:
    """Where a run stands.

    Attributes:
        evaluated: the step of the last evaluation; -1 before the first.
        measure: the name of what counts in evaluations.
        waited: evaluations since the best one.
        best: pairs of the measure and its step, the best first; as many as are kept, at least one.
        bad: updates in a row that were not finite.
    """

    evaluated: int = -1
    measure: str = ""
    waited: int = 0
    best: tuple[tuple[float, int], ...] = ()
    bad: int = 0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "RunProgress":
        """The course that `dataclasses.asdict` made these fields of."""
        best = tuple((value, step) for value, step in fields["best"])
        return cls(**{**fields, "best": best})

    def after(
        self, step: int, measures: Mapping[str, float], evaluation: EvaluationSettings, *, kept: int
    ) -> "RunProgress":
        """The course after the evaluation of a step.

        Args:
            step: which.
            measures: what was measured, by name.
            evaluation: says which measure counts.
            kept: how many best steps are remembered.

        Raises:
            ValueError: the measure that counts was not taken.
        """
        name = measure_of(measures, evaluation)
        value = measures.get(name, math.nan)
        if math.isnan(value):
            return dataclasses.replace(self, evaluated=step, measure=name, waited=self.waited + 1)
        sign = 1 if name.endswith(_LESS_IS_BETTER) else -1
        ranked = sorted([*self.best, (value, step)], key=lambda pair: (sign * pair[0], pair[1]))
        waited = 0 if ranked[0][1] == step else self.waited + 1
        best = tuple(ranked[: max(kept, 1)])
        return dataclasses.replace(self, evaluated=step, measure=name, waited=waited, best=best)

    def best_steps(self, kept: int) -> tuple[int, ...]:
        """The steps whose checkpoints stay because they measured best."""
        return tuple(step for _, step in self.best[:kept])

    def ended_early(self, evaluation: EvaluationSettings) -> str:
        """Why the run ends before its last step; empty if it does not."""
        if evaluation.patience and self.waited >= evaluation.patience:
            value, step = self.best[0] if self.best else (math.nan, 0)
            return f"no better than {value:.4g} of step {step} in {self.waited} evaluations"
        if evaluation.enough is not None and self.best and self.waited == 0:
            value, step = self.best[0]
            less = self.measure.endswith(_LESS_IS_BETTER)
            if value <= evaluation.enough if less else value >= evaluation.enough:
                return f"{self.measure} reached {value:.4g}"
        return ""


def measure_of(measures: Mapping[str, float], evaluation: EvaluationSettings) -> str:
    """The name of the measure that counts: the one that is named, or the first.

    Raises:
        ValueError: the named one is not among them.
    """
    if evaluation.measure and evaluation.measure not in measures:
        raise ValueError(
            f"`config.evaluation.measure` must be one of {', '.join(measures)}; "
            f"got {evaluation.measure!r}."
        )
    return evaluation.measure or next(iter(measures), "")
