"""The learning rates of a sweep."""

import math
from collections.abc import Iterable, Mapping
from typing import TypeVar

Rate = TypeVar("Rate", float, str)


def lowest_loss_rate(losses: Mapping[Rate, float]) -> Rate:
    """Returns the rate with the lowest loss of those that did not diverge."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: finite[rate])


def at_edge(rate: float | str, tried: Iterable[float | str]) -> bool:
    """Tells whether a rate is the smallest or largest of those tried: a better one may lie beyond.

    Args:
        rate: one of `tried`.
        tried: the rates; of one or two, each is at the edge.
    """
    rates = [float(one) for one in tried]
    return float(rate) in (min(rates), max(rates))
