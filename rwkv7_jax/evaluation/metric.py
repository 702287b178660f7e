"""Metrics with their units, and their names in logs."""

import dataclasses
from typing import Literal, get_args

from rwkv7_jax.checks import check_choice, prefix_errors

Unit = Literal["bits_per_byte", "nats", "perplexity", "accuracy", "reward"]

UNITS: tuple[Unit, ...] = get_args(Unit)

_HIGHER_IS_BETTER: dict[Unit, bool] = {
    "bits_per_byte": False,
    "nats": False,
    "perplexity": False,
    "accuracy": True,
    "reward": True,
}


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number that an evaluator measured.

    Attributes:
        value: the number.
        unit: unit of the number.
        higher_is_better: whether the higher of two values is the better one.
    """

    value: float
    unit: Unit
    higher_is_better: bool

    @classmethod
    def of(cls, value: float, unit: Unit) -> "Metric":
        """Makes a metric; whether higher is better follows from the unit.

        Raises:
            ValueError: an unknown unit.
        """
        with prefix_errors("Metric.of"):
            check_choice(unit, UNITS, "`unit`")
        return cls(float(value), unit, _HIGHER_IS_BETTER[unit])


# Metrics by their names in logs.
Metrics = dict[str, Metric]


def log_name(subject: str, unit: Unit) -> str:
    """Names a metric in logs and settings, such as "held_out_accuracy"."""
    return f"{subject}_{unit}"


def unit_of(name: str) -> Unit | None:
    """Returns the unit of a metric by its name in a log; None for numbers of other origin.

    Logs and checkpoints hold only names and values. All their readers call this function, so that
    only this module interprets names.
    """
    for unit in UNITS:
        # No unit is a suffix of another, so their order does not matter.
        if name.endswith(unit):
            return unit
    return None


def logged_metric(name: str, value: float) -> Metric:
    """Makes the metric of a name and value from a log or a checkpoint.

    A number without a known unit counts as a reward: higher is better.
    """
    unit = unit_of(name)
    if unit is None:
        return Metric(value, "reward", higher_is_better=True)
    return Metric.of(value, unit)
