"""Early stopping: which evaluation is best, and when a run ends."""

import pytest

from rwkv7_jax.evaluation.metric import Metric, logged_metric
from rwkv7_jax.runs.early_stopping import RunProgress
from rwkv7_jax.runs.settings import EvaluationSettings

OTHER = Metric(0.0, "reward", higher_is_better=True)


OTHER_TEXT = {"measure": "retention_bits_per_byte", "retention": "stdlib"}


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


def test_lower_bits_and_higher_accuracies_are_better():
    course, _ = measured([3.0, 1.0, 2.0, 1.0], kept=2)
    assert course.best == ((1.0, 10), (1.0, 30)) and course.waited == 2
    course, _ = measured([0.1, 0.9, 0.5], name="copy_accuracy", kept=2)
    assert course.best_steps(1) == (10,)


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
    course = RunProgress().for_evaluation(was, 0)
    numbers = {"held_out_bits_per_byte": logged_metric("held_out_bits_per_byte", 1.0)}
    course = course.with_evaluation(10, numbers, was, kept=1)
    course = course.with_evaluation(20, numbers, was, kept=1)
    assert course.waited == 1
    assert course.for_evaluation(was, 20) == course
    now = course.for_evaluation(EvaluationSettings(**changes), 20)
    assert (now.best, now.waited, now.since) == ((), 0, 20)
    kept = RunProgress.from_json(now.to_json())
    assert kept.for_evaluation(EvaluationSettings(**changes), 30) == kept


def test_interval_and_patience_do_not_make_another_evaluation():
    course = RunProgress().for_evaluation(EvaluationSettings(), 0)
    other = EvaluationSettings(every=5, patience=3, enough=0.5, retention="stdlib")
    assert course.for_evaluation(other, 20) == course


def test_a_checkpoint_without_a_digest_of_its_evaluations_resumes():
    fields = RunProgress(evaluated=10, best=((1.0, 10),)).to_json()
    del fields["reads"], fields["since"]
    course = RunProgress.from_json(fields)
    assert course.for_evaluation(EvaluationSettings(), 10).best == ((1.0, 10),)


def test_an_unknown_measure_is_rejected_by_name():
    with pytest.raises(
        ValueError, match=r"must be one of held_out_bits_per_byte, other; got"
    ):
        measured([1.0], measure="accuracy")
