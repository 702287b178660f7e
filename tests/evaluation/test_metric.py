"""Metrics: their units say what is better, and names in logs give the unit back."""

import pytest

from rwkv7_jax.evaluation.metric import UNITS, Metric, log_name, logged_metric, unit_of


@pytest.mark.parametrize("unit", UNITS)
def test_the_name_in_a_log_gives_the_metric_back(unit):
    metric = Metric.of(0.5, unit)
    assert logged_metric(log_name("held_out", unit), 0.5) == metric


def test_less_is_better_of_losses_and_more_of_scores():
    better = {unit: Metric.of(1.0, unit).higher_is_better for unit in UNITS}
    assert better == {
        "bits_per_byte": False,
        "nats": False,
        "perplexity": False,
        "accuracy": True,
        "reward": True,
    }


def test_numbers_that_no_evaluator_made_have_no_unit():
    assert unit_of("grad_norm") is None
