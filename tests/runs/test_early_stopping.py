"""Early stopping: which evaluation is best, and when a run ends."""

import numpy as np
import pytest

from rwkv7_jax.evaluation.metric import Metric, logged_metric
from rwkv7_jax.runs.early_stopping import Progress, StateProgress
from rwkv7_jax.runs.settings import EvaluationSettings

OTHER = Metric(0.0, "reward", higher_is_better=True)


OTHER_TEXT = {"measure": "retention_bits_per_byte", "retention": "stdlib"}


def measured(values, name="held_out_bits_per_byte", kept=1, **choices):
    evaluation = EvaluationSettings(**choices)
    course = Progress()
    for step, value in enumerate(values):
        course = course.with_evaluation(
            10 * step,
            {name: logged_metric(name, value), "other": OTHER},
            evaluation,
            kept=kept,
        )
    return course, evaluation


def only(course):
    """Returns the progress of a run's single state."""
    (one,) = course.states.values()
    return one


def test_lower_bits_and_higher_accuracies_are_better():
    course, _ = measured([3.0, 1.0, 2.0, 1.0], kept=2)
    assert only(course).best == ((1.0, 10), (1.0, 30)) and only(course).waited == 2
    course, _ = measured([0.1, 0.9, 0.5], name="copy_accuracy", kept=2)
    assert course.best_steps(1) == {10}


def test_a_run_ends_after_evaluations_without_improvement():
    for count, ends in ((3, False), (4, True)):
        course, evaluation = measured([1.0, 2.0, 2.0, float("nan")][:count], patience=3)
        assert (course.stop_reason(evaluation) is not None) == ends


def test_a_run_ends_when_its_measure_reaches_enough():
    for values, ends in (([0.2, 0.8], False), ([0.2, 0.98], True)):
        course, evaluation = measured(values, name="held_out_reward", enough=0.97)
        assert (course.stop_reason(evaluation) is not None) == ends


@pytest.mark.parametrize(
    "changes", [{"windows": 8}, {"length": 64}, {"measure": "other"}, OTHER_TEXT]
)
def test_results_of_other_evaluations_do_not_count(changes):
    was = EvaluationSettings()
    course = Progress().for_evaluation(was, 0)
    numbers = {"held_out_bits_per_byte": logged_metric("held_out_bits_per_byte", 1.0)}
    course = course.with_evaluation(10, numbers, was, kept=1)
    course = course.with_evaluation(20, numbers, was, kept=1)
    assert only(course).waited == 1
    assert course.for_evaluation(was, 20) == course
    now = course.for_evaluation(EvaluationSettings(**changes), 20)
    assert (only(now).best, only(now).waited, now.since) == ((), 0, 20)
    kept = Progress.from_json(now.to_json())
    assert kept.for_evaluation(EvaluationSettings(**changes), 30) == kept


def test_interval_and_patience_do_not_make_another_evaluation():
    course = Progress().for_evaluation(EvaluationSettings(), 0)
    other = EvaluationSettings(every=5, patience=3, enough=0.5, retention="stdlib")
    assert course.for_evaluation(other, 20) == course


def test_a_checkpoint_without_a_digest_of_its_evaluations_resumes():
    fields = Progress({"": StateProgress(evaluated=10, best=((1.0, 10),))}).to_json()
    del fields["reads"], fields["since"]
    course = Progress.from_json(fields)
    assert only(course.for_evaluation(EvaluationSettings(), 10)).best == ((1.0, 10),)


def test_an_unknown_measure_is_rejected_by_name():
    with pytest.raises(
        ValueError, match=r"must be one of held_out_bits_per_byte, other; got"
    ):
        measured([1.0], measure="accuracy")


def test_each_of_several_states_ends_as_if_alone():
    evaluation = EvaluationSettings(patience=1)
    course = Progress.of_states(["cook", "poet"])
    for step, poet in ((0, 3.0), (10, 2.0), (20, 1.0), (30, 2.0)):
        numbers = {}
        # The cook ends at step 10, and its better value of step 20 does not count.
        for name, value in (("cook", 0.5 if step == 20 else 1.0), ("poet", poet)):
            metric = f"{name}/held_out_bits_per_byte"
            numbers[metric] = logged_metric(metric, value)
        course = course.with_evaluation(step, numbers, evaluation, kept=1)
        assert (course.stop_reason(evaluation) is None) == (step < 30)
    assert course.best_steps(1) == {0, 20} and course.evaluated == 30
    reason = course.stop_reason(evaluation) or ""
    assert reason.startswith("cook: no better than 1 of step 0 ")
    assert Progress.from_json(course.to_json()) == course


def test_a_state_that_is_given_up_stays_so_and_a_single_one_recovers():
    several = Progress.of_states(["cook", "poet"])
    single = Progress()
    for applied in (False, False, True):
        several = several.with_update(np.array([applied, True]), 2)
        single = single.with_update(np.bool_(applied), 2)
    assert several.given_up(2) == ["cook"] and several.bad == 2
    assert several.skipped(np.array([False, False]), 2) == [(1, "poet")]
    assert not several.is_given_up(2)
    assert single.bad == 0 and single.given_up(1) == []
    assert single.skipped(np.bool_(False), 1) == [(0, "")]
    assert single.with_update(np.bool_(False), 1).is_given_up(1)
