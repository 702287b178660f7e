"""Metrics: units define which direction is better, and log names identify the unit."""

import pytest

from rwkv7_jax.evaluation.metric import UNITS, Metric, log_name, logged_metric, unit_of


@pytest.mark.parametrize("unit", UNITS)
def test_a_log_name_round_trips_to_its_metric(unit):
    metric = Metric.of(0.5, unit)
    assert logged_metric(log_name("held_out", unit), 0.5) == metric


def test_lower_losses_and_higher_scores_are_better():
    better = {unit: Metric.of(1.0, unit).higher_is_better for unit in UNITS}
    assert better == {
        "bits_per_byte": False,
        "nats": False,
        "perplexity": False,
        "accuracy": True,
        "reward": True,
    }


def test_other_metrics_have_no_unit():
    assert unit_of("grad_norm") is None
