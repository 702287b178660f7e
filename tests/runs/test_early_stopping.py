"""Early stopping: which evaluation is best, and when a run ends."""

import pytest

from rwkv7_jax.evaluation.metric import Metric, logged_metric
from rwkv7_jax.runs.early_stopping import RunProgress
from rwkv7_jax.runs.settings import EvaluationSettings

OTHER = Metric(0.0, "reward", higher_is_better=True)


def measured(values, name="held_out_bits_per_byte", kept=1, **choices):
    evaluation = EvaluationSettings(**choices)
    course = RunProgress()
    for step, value in enumerate(values):
        course = course.with_evaluation(
            10 * step,
            {name: logged_metric(name, value), "other": OTHER},
            evaluation,
            kept=kept,
        )
    return course, evaluation


def test_less_is_better_for_bits_and_more_for_accuracies():
    course, _ = measured([3.0, 1.0, 2.0, 1.0], kept=2)
    assert course.best == ((1.0, 10), (1.0, 30)) and course.waited == 2
    course, _ = measured([0.1, 0.9, 0.5], name="copy_accuracy", kept=2)
    assert course.best_steps(1) == (10,)


def test_a_run_ends_after_evaluations_without_a_better_one():
    for count, ends in ((3, False), (4, True)):
        course, evaluation = measured([1.0, 2.0, 2.0, float("nan")][:count], patience=3)
        assert (course.stop_reason(evaluation) is not None) == ends


def test_a_run_ends_when_its_measure_is_enough():
    for values, ends in (([0.2, 0.8], False), ([0.2, 0.98], True)):
        course, evaluation = measured(values, name="held_out_reward", enough=0.97)
        assert (course.stop_reason(evaluation) is not None) == ends


def test_a_measure_that_is_not_taken_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"must be one of held_out_bits_per_byte, other; got"
    ):
        measured([1.0], measure="accuracy")
