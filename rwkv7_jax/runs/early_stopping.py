"""Early stopping and the best checkpoints.

Every checkpoint stores this progress, so a resumed run decides as an uninterrupted one would.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from rwkv7_jax.evaluation.metric import Metric, logged_metric
from rwkv7_jax.runs.settings import EvaluationSettings
from rwkv7_jax.text.tokenizer import text_digest


@dataclasses.dataclass(frozen=True)
class StateProgress:
    """The progress of one state of a run, or of the weights that it trains.

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
    def from_json(cls, fields: Mapping[str, Any]) -> "StateProgress":
        """Restores the progress from the fields in a checkpoint."""
        best = tuple((value, step) for value, step in fields["best"])
        return cls(**{**fields, "best": best})

    def for_evaluation(
        self, evaluation: EvaluationSettings, step: int
    ) -> "StateProgress":
        """Returns the progress at the start of a process; see `Progress.for_evaluation`."""
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

    def with_update(self, is_applied: bool) -> "StateProgress":
        """Returns the progress after an update that was applied, or skipped as non-finite."""
        return dataclasses.replace(self, bad=0 if is_applied else self.bad + 1)

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
    ) -> "StateProgress":
        """Returns the progress after an evaluation; see `Progress.with_evaluation`.

        Args:
            step: the evaluated step.
            metrics: of this state, without its name.
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
class Progress:
    """The progress of a run, as its checkpoints store it.

    Start states that are tuned together have a progress each, as if in a run of its own. It stays
    fixed once such a run would have ended.

    Attributes:
        states: the progress of each state by name. A run that trains one state or weights has a
            single entry, of the name "".
    """

    states: Mapping[str, StateProgress] = dataclasses.field(
        default_factory=lambda: {"": StateProgress()}
    )

    @classmethod
    def of_states(cls, names: Iterable[str]) -> "Progress":
        """Makes the progress of several states before the first step."""
        return cls({name: StateProgress() for name in names})

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Progress":
        """Restores the progress from the fields that `to_json` returned."""
        states = {}
        for name, one in fields.get("states", {"": fields}).items():
            states[name] = StateProgress.from_json(one)
        return cls(states)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as checkpoints store them."""
        states = {name: dataclasses.asdict(one) for name, one in self.states.items()}
        return states.get("", {"states": states})

    def for_evaluation(self, evaluation: EvaluationSettings, step: int) -> "Progress":
        """Returns the progress of a run that starts or resumes with these evaluations.

        If they differ from the previous evaluations, the best steps so far are forgotten.

        Args:
            evaluation: the group of settings.
            step: the step at which the run starts or resumes.
        """
        states = {}
        for name, one in self.states.items():
            states[name] = one.for_evaluation(evaluation, step)
        return Progress(states)

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

    def with_update(self, updated: Any, limit: int | None) -> "Progress":
        """Returns the progress after a step.

        Args:
            updated: whether the update of each state was applied; a scalar for a single one.
            limit: the number of consecutive skipped updates at which a state is given up for good.
        """
        given_up = self.given_up(limit)
        applied = np.atleast_1d(updated)
        states = {}
        for (name, one), is_applied in zip(self.states.items(), applied, strict=True):
            states[name] = one if name in given_up else one.with_update(is_applied)
        return Progress(states)

    def skipped(self, updated: Any, limit: int | None) -> list[tuple[int, str]]:
        """Lists the index and name of each state whose update was skipped and that continues.

        Args:
            updated: as of `with_update`.
            limit: as of `with_update`.
        """
        given_up = self.given_up(limit)
        applied = np.atleast_1d(updated)
        found = []
        for index, name in enumerate(self.states):
            if not applied[index] and name not in given_up:
                found.append((index, name))
        return found

    def given_up(self, limit: int | None) -> list[str]:
        """Returns the names of the states that are given up while others may continue."""
        # Without a name the run itself ends.
        return [
            name for name, one in self.states.items() if name and one.is_given_up(limit)
        ]

    def is_given_up(self, limit: int | None) -> bool:
        """Returns whether every state had `limit` consecutive skipped updates; never if None."""
        return all(one.is_given_up(limit) for one in self.states.values())

    def with_evaluation(
        self,
        step: int,
        metrics: Mapping[str, Metric],
        evaluation: EvaluationSettings,
        *,
        kept: int,
    ) -> "Progress":
        """Returns the progress after the evaluation of a step.

        Args:
            step: the evaluated step.
            metrics: by name; those of a state with a name begin with it, such as
                "poet/held_out_bits_per_byte".
            evaluation: names the metric that decides.
            kept: how many best steps of each state to remember.

        Raises:
            ValueError: `metrics` lacks the metric that decides.
        """
        states = {}
        for name, one in self.states.items():
            prefix = f"{name}/" if name else ""
            own = {}
            for metric, value in metrics.items():
                if metric.startswith(prefix):
                    own[metric.removeprefix(prefix)] = value
            has_ended = name and one.stop_reason(evaluation)
            if not has_ended:
                one = one.with_evaluation(step, own, evaluation, kept=kept)
            states[name] = one
        return Progress(states)

    def best_steps(self, kept: int) -> set[int]:
        """Returns the best `kept` steps of each state, whose checkpoints are kept."""
        steps = set()
        for one in self.states.values():
            steps |= {step for _, step in one.best[:kept]}
        return steps

    def stop_reason(self, evaluation: EvaluationSettings) -> str | None:
        """Returns why every state ends before the last step; None if a state continues."""
        reasons = []
        for name, one in self.states.items():
            reason = one.stop_reason(evaluation)
            if reason is None:
                return None
            reasons.append(f"{name}: {reason}" if name else reason)
        return "; ".join(reasons)


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
