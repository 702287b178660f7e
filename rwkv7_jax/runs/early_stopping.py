"""Early stopping and the best checkpoints.

Every checkpoint stores this progress, so a resumed run decides as an uninterrupted one would.
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
    """The progress of a run, as its checkpoints store it.

    Attributes:
        evaluated: the step of the last evaluation; -1 before the first.
        measure: the name of the metric that decides; "" before the first evaluation.
        waited: the number of evaluations since the best one.
        best: pairs of the metric's value and its step, best first; limited to the number of best
            steps to keep, but to no fewer than one.
        bad: the number of consecutive non-finite updates.
        reads: digest of what evaluations read and measure; "" in checkpoints that did not store it.
        since: the step from which on all evaluations read and measure the same.
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
        """Restores the progress from the fields that `to_json` returned."""
        best = tuple((value, step) for value, step in fields["best"])
        return cls(**{**fields, "best": best})

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as checkpoints store them."""
        return dataclasses.asdict(self)

    def for_evaluation(
        self, evaluation: EvaluationSettings, step: int
    ) -> "RunProgress":
        """Returns the progress of a run that starts or resumes with these evaluations.

        If they differ from the previous evaluations, the best steps so far are forgotten.

        Args:
            evaluation: the group of settings.
            step: the step at which the run starts or resumes.
        """
        measure = evaluation.measure or "held_out"
        # The run's identity already rejects a change of the held-out data itself.
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
        """Returns the progress after an update that was applied, or skipped as non-finite.

        Args:
            updated: whether the update was applied.
            limit: the number of consecutive skipped updates that ends the run; unused here.
        """
        bad = 0 if updated else self.bad + 1
        return self if bad == self.bad else dataclasses.replace(self, bad=bad)

    def skipped(self, updated: Any, limit: int | None) -> list[tuple[int, str]]:
        """Lists the skipped updates of a step: none, or index 0 with an empty name."""
        return [] if updated else [(0, "")]

    @property
    def by_name(self) -> Mapping[str, "RunProgress"]:
        """This progress under the name "", because the state of a single run has no name."""
        return {"": self}

    def given_up(self, limit: int | None) -> list[str]:
        """Returns an empty list, because the state of a single run has no name."""
        return []

    def is_given_up(self, limit: int | None) -> bool:
        """Returns whether `limit` consecutive updates were skipped; never if it is None."""
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
            step: the evaluated step.
            metrics: of the evaluation, by name.
            evaluation: names the metric that decides.
            kept: how many best steps to remember.

        Raises:
            ValueError: `metrics` lacks the metric that decides.
        """
        check_measure(evaluation, metrics)
        name = evaluation.measure or next(iter(metrics), "")
        metric = metrics.get(name)
        if metric is None or math.isnan(metric.value):
            return dataclasses.replace(
                self, evaluated=step, measure=name, waited=self.waited + 1
            )
        # Sorted in ascending order, so that the first pair is the best.
        sign = -1 if metric.higher_is_better else 1
        # Ties go to the earlier step.
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
        """Returns the best steps, whose checkpoints are kept."""
        return tuple(step for _, step in self.best[:kept])

    def stop_reason(self, evaluation: EvaluationSettings) -> str | None:
        """Returns why the run ends before its last step; None if it continues."""
        if evaluation.patience and self.waited >= evaluation.patience:
            # `best` is empty if every value so far was NaN.
            value = math.nan
            step = 0
            if self.best:
                value, step = self.best[0]
            return f"no better than {value:.4g} of step {step} in {self.waited} evaluations"
        # An earlier best value was compared with `enough` when it was measured.
        if evaluation.enough is None or not self.best or self.waited:
            return None
        # A checkpoint stores the metric's name but not its unit.
        metric = logged_metric(self.measure, self.best[0][0])
        if metric.higher_is_better:
            reached = metric.value >= evaluation.enough
        else:
            reached = metric.value <= evaluation.enough
        return f"{self.measure} reached {metric.value:.4g}" if reached else None


@dataclasses.dataclass(frozen=True)
class StackProgress:
    """The progress of start states that are tuned together, each as if in a run of its own.

    Attributes:
        states: the progress of each state, by name. The progress of a state stays fixed once a run
            of its own would have ended.
    """

    states: Mapping[str, RunProgress]

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as checkpoints store them."""
        return {"states": {name: one.to_json() for name, one in self.states.items()}}

    def for_evaluation(
        self, evaluation: EvaluationSettings, step: int
    ) -> "StackProgress":
        """Returns the progress of a run that starts or resumes with these evaluations."""
        states = {}
        for name, one in self.states.items():
            states[name] = one.for_evaluation(evaluation, step)
        return StackProgress(states)

    @property
    def since(self) -> int:
        """The step from which on all evaluations read and measure the same."""
        return max(one.since for one in self.states.values())

    @property
    def evaluated(self) -> int:
        """The step of the last evaluation; -1 before the first."""
        return max(one.evaluated for one in self.states.values())

    @property
    def bad(self) -> int:
        """The largest number of consecutive non-finite updates of any state."""
        return max(one.bad for one in self.states.values())

    def with_update(self, updated: Any, limit: int | None) -> "StackProgress":
        """Returns the progress after a step.

        Args:
            updated: for each state, whether its update was applied.
            limit: the number of consecutive skipped updates at which a state is given up for good.
        """
        states = {}
        for (name, one), applied in zip(self.states.items(), updated, strict=True):
            given_up = one.is_given_up(limit)
            states[name] = one if given_up else one.with_update(applied, limit)
        return StackProgress(states)

    def skipped(self, updated: Any, limit: int | None) -> list[tuple[int, str]]:
        """Lists the index and name of each state whose update was skipped and that continues."""
        found = []
        for index, (name, one) in enumerate(self.states.items()):
            if not updated[index] and not one.is_given_up(limit):
                found.append((index, name))
        return found

    @property
    def by_name(self) -> Mapping[str, RunProgress]:
        """The progress of each state, by name."""
        return self.states

    def given_up(self, limit: int | None) -> list[str]:
        """Returns the names of the states that are given up."""
        return [name for name, one in self.states.items() if one.is_given_up(limit)]

    def is_given_up(self, limit: int | None) -> bool:
        """Returns whether every state is given up."""
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
            step: the evaluated step.
            metrics: of all states, by names such as "poet/held_out_bits_per_byte".
            evaluation: names the metric that decides.
            kept: how many best steps of each state to remember.

        Raises:
            ValueError: `metrics` lacks the metric that decides.
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
        """Returns the best steps of all states, whose checkpoints are kept."""
        steps: list[int] = []
        for one in self.states.values():
            steps += one.best_steps(kept)
        return tuple(sorted(set(steps)))

    def stop_reason(self, evaluation: EvaluationSettings) -> str | None:
        """Returns why every state ends before the last step; None if a state continues."""
        reasons = []
        for name, one in self.states.items():
            reason = one.stop_reason(evaluation)
            if reason is None:
                return None
            reasons.append(f"{name}: {reason}")
        return "; ".join(reasons)


Progress = RunProgress | StackProgress


def read_progress(fields: Mapping[str, Any]) -> Progress:
    """Reads the progress that a checkpoint stores."""
    if "states" not in fields:
        return RunProgress.from_json(fields)
    states = {}
    for name, one in fields["states"].items():
        states[name] = RunProgress.from_json(one)
    return StackProgress(states)


def check_measure(evaluation: EvaluationSettings, metrics: Collection[str]) -> None:
    """Checks that `config.evaluation.measure`, if set, names one of the metrics.

    Raises:
        ValueError: it does not.
    """
    if evaluation.measure and evaluation.measure not in metrics:
        raise ValueError(
            f"`config.evaluation.measure` must be one of {', '.join(metrics)}; "
            f"got {evaluation.measure!r}."
        )
