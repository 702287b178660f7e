"""Early stopping and the best checkpoints: bookkeeping that is saved with every checkpoint.

A run that was killed therefore decides as an unbroken one does.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from rwkv7_jax.evaluation.metric import Metric, logged_metric
from rwkv7_jax.runs.settings import EvaluationSettings
from rwkv7_jax.text.tokenizer import text_digest


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
        reads: digest of what its evaluations read and measure; "" of checkpoints that did not know.
        since: the step from which on evaluations read the same as the last one.
    """

    # These names are keys in checkpoints.
    evaluated: int = -1
    measure: str = ""
    waited: int = 0
    best: tuple[tuple[float, int], ...] = ()
    bad: int = 0
    reads: str = ""
    since: int = 0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "RunProgress":
        """Reads the fields that `dataclasses.asdict` gave and JSON stored."""
        best = tuple((value, step) for value, step in fields["best"])
        return cls(**{**fields, "best": best})

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as they stand in checkpoints."""
        return dataclasses.asdict(self)

    def for_evaluation(
        self, evaluation: EvaluationSettings, step: int
    ) -> "RunProgress":
        """Returns the progress of a run that goes on, or begins, with these evaluations.

        Where they differ from those before, the best steps so far are forgotten.

        Args:
            evaluation: the group of settings.
            step: from which on the run works with them.
        """
        measure = evaluation.measure or "held_out"
        # A change of the held-out data itself is refused by the run's identity.
        other = "" if measure.startswith("held_out") else evaluation.retention
        reads = text_digest(
            repr((evaluation.windows, evaluation.length, evaluation.measure, other))
        )
        if self.reads in ("", reads):
            return dataclasses.replace(self, reads=reads)
        return dataclasses.replace(
            self, reads=reads, since=step, evaluated=-1, waited=0, best=()
        )

    def with_update(self, updated: Any, limit: int | None) -> "RunProgress":
        """Returns the progress after an update that was made, or left out as not finite.

        Args:
            updated: whether it was made.
            limit: updates left out in a row at which the run is given up; not read here.
        """
        bad = 0 if updated else self.bad + 1
        return self if bad == self.bad else dataclasses.replace(self, bad=bad)

    def skipped(self, updated: Any, limit: int | None) -> list[tuple[int, str]]:
        """Lists what was left out at a step: nothing, or place 0 without a name."""
        return [] if updated else [(0, "")]

    @property
    def by_name(self) -> Mapping[str, "RunProgress"]:
        """This progress under the name "", which a run of one state has."""
        return {"": self}

    def given_up(self, limit: int | None) -> list[str]:
        """Lists the states that are given up by name: a run of one state has no names."""
        return []

    def is_given_up(self, limit: int | None) -> bool:
        """Tells whether as many updates in a row were left out as end a run; None for never."""
        return limit is not None and self.bad >= limit

    def with_evaluation(
        self,
        step: int,
        metrics: Mapping[str, Metric],
        evaluation: EvaluationSettings,
        *,
        kept: int,
    ) -> "RunProgress":
        """Returns the progress after the evaluation of a step.

        Args:
            step: of the evaluation.
            metrics: of the evaluation, by name.
            evaluation: says which metric decides.
            kept: how many best steps are remembered.

        Raises:
            ValueError: the metric that decides is not among them.
        """
        check_measure(evaluation, metrics)
        name = evaluation.measure or next(iter(metrics), "")
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


@dataclasses.dataclass(frozen=True)
class StackProgress:
    """The progress of start states that are tuned together, each as if it were alone.

    Attributes:
        states: the progress of each state by its name. That of a state whose own run would have
            ended stays as it was then.
    """

    states: Mapping[str, RunProgress]

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as they stand in checkpoints."""
        return {"states": {name: one.to_json() for name, one in self.states.items()}}

    def for_evaluation(
        self, evaluation: EvaluationSettings, step: int
    ) -> "StackProgress":
        """Returns the progress of a run that goes on, or begins, with these evaluations."""
        states = {}
        for name, one in self.states.items():
            states[name] = one.for_evaluation(evaluation, step)
        return StackProgress(states)

    @property
    def since(self) -> int:
        """The step from which on evaluations read the same as the last one."""
        return max(one.since for one in self.states.values())

    @property
    def evaluated(self) -> int:
        """The step of the last evaluation; -1 before the first."""
        return max(one.evaluated for one in self.states.values())

    @property
    def bad(self) -> int:
        """The longest row of updates that were not finite."""
        return max(one.bad for one in self.states.values())

    def with_update(self, updated: Any, limit: int | None) -> "StackProgress":
        """Returns the progress after a step.

        Args:
            updated: for each state, whether its update was made.
            limit: updates left out in a row at which a state is given up for good.
        """
        states = {}
        for (name, one), made in zip(self.states.items(), updated, strict=True):
            given_up = one.is_given_up(limit)
            states[name] = one if given_up else one.with_update(made, limit)
        return StackProgress(states)

    def skipped(self, updated: Any, limit: int | None) -> list[tuple[int, str]]:
        """Lists the states whose update was left out, by place and name; not those given up."""
        found = []
        for place, (name, one) in enumerate(self.states.items()):
            if not updated[place] and not one.is_given_up(limit):
                found.append((place, name))
        return found

    @property
    def by_name(self) -> Mapping[str, RunProgress]:
        """The progress of each state by its name."""
        return self.states

    def given_up(self, limit: int | None) -> list[str]:
        """Lists the states that are given up."""
        return [name for name, one in self.states.items() if one.is_given_up(limit)]

    def is_given_up(self, limit: int | None) -> bool:
        """Tells whether every state is given up."""
        return all(one.is_given_up(limit) for one in self.states.values())

    def with_evaluation(
        self,
        step: int,
        metrics: Mapping[str, Metric],
        evaluation: EvaluationSettings,
        *,
        kept: int,
    ) -> "StackProgress":
        """Returns the progress after the evaluation of a step.

        Args:
            step: of the evaluation.
            metrics: of all states, by names such as "poet/held_out_bits_per_byte".
            evaluation: says which metric decides.
            kept: how many best steps of each state are remembered.

        Raises:
            ValueError: the metric that decides is not among them.
        """
        states = {}
        for name, one in self.states.items():
            own = {}
            for metric, value in metrics.items():
                if metric.startswith(f"{name}/"):
                    own[metric.removeprefix(f"{name}/")] = value
            if not one.stop_reason(evaluation):
                one = one.with_evaluation(step, own, evaluation, kept=kept)
            states[name] = one
        return StackProgress(states)

    def best_steps(self, kept: int) -> tuple[int, ...]:
        """Lists the best steps of all states, whose checkpoints are kept."""
        steps: list[int] = []
        for one in self.states.values():
            steps += one.best_steps(kept)
        return tuple(sorted(set(steps)))

    def stop_reason(self, evaluation: EvaluationSettings) -> str | None:
        """Tells why the run ends before its last step: no state goes on. None if one does."""
        reasons = []
        for name, one in self.states.items():
            reason = one.stop_reason(evaluation)
            if reason is None:
                return None
            reasons.append(f"{name}: {reason}")
        return "; ".join(reasons)


Progress = RunProgress | StackProgress


def read_progress(fields: Mapping[str, Any]) -> Progress:
    """Reads the progress that a checkpoint holds."""
    if "states" not in fields:
        return RunProgress.from_json(fields)
    states = {}
    for name, one in fields["states"].items():
        states[name] = RunProgress.from_json(one)
    return StackProgress(states)


def check_measure(evaluation: EvaluationSettings, metrics: Collection[str]) -> None:
    """Raises if `config.evaluation.measure` names none of the metrics.

    Raises:
        ValueError: it does not.
    """
    if evaluation.measure and evaluation.measure not in metrics:
        raise ValueError(
            f"`config.evaluation.measure` must be one of {', '.join(metrics)}; "
            f"got {evaluation.measure!r}."
        )
