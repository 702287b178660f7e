"""A ratio of sums over windows, rows or questions, its standard error and paired differences."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from rwkv7_jax.checks import prefix_errors

_COLUMN_WIDTH = 18


@dataclasses.dataclass(frozen=True, eq=False)
class Ratio:
    """Sums whose ratio is a measured value, part by part.

    Attributes:
        totals: what each part adds: its bits, or 1 where an answer is right.
        weights: what the sum of these is divided by: the bytes of each part, or 1.
    """

    totals: Float[np.ndarray, " Q"]
    weights: Float[np.ndarray, " Q"]

    @property
    def value(self) -> float:
        """The ratio of the sums, so that short parts do not count more; NaN of no weight."""
        return ratio(self.totals, self.weights)[0]

    @property
    def standard_error(self) -> float:
        """Of the value, over parts; NaN of a single one."""
        return ratio(self.totals, self.weights)[1]

    def difference(self, base: "Ratio") -> tuple[float, float]:
        """Returns this value less that of `base`, and the standard error over pairs of parts.

        A part that is hard for both adds nothing to the error of a paired difference.

        Raises:
            ValueError: the two are not of the same parts.
        """
        with prefix_errors("Ratio.difference"):
            if not np.array_equal(self.weights, base.weights):
                raise ValueError(
                    "`base` must be of the same parts, with the same weights; "
                    f"got {len(base.weights)} parts for {len(self.weights)}."
                )
        return ratio(self.totals - base.totals, self.weights)


def ratio(
    totals: Float[np.ndarray, " Q"], weights: Float[np.ndarray, " Q"]
) -> tuple[float, float]:
    """Returns a ratio of sums and its standard error; where weights are 1, those of a mean.

    Both are NaN where nothing weighs anything, and the error is NaN of a single part.
    """
    count = len(totals)
    weight = weights.sum()
    # A mean over nothing is missing; 0 would look perfect.
    if not weight:
        return math.nan, math.nan
    value = totals.sum() / weight
    if count < 2:
        return float(value), math.nan
    residuals = totals - value * weights
    variance = (residuals**2).sum() * count / (count - 1)
    return float(value), float(math.sqrt(variance) / weight)


def difference_from(base: Any, row: Any) -> tuple[float, float] | None:
    """Returns a row's difference from the base and its standard error; None for the base itself.

    Args:
        base: the first row of a table.
        row: of the same kind, which has a method `difference`.
    """
    return None if row is base else row.difference(base)


def estimate_head(name: str) -> str:
    """Formats the heads of two columns: of a value, and of its difference from the base."""
    return f"{name:>{_COLUMN_WIDTH}}{'difference':>{_COLUMN_WIDTH}}"


def estimate_columns(
    estimate: tuple[float, float], difference: tuple[float, float] | None
) -> str:
    """Formats a value and its difference from the base, each with its standard error if known.

    Args:
        estimate: the value and its error.
        difference: that of the base, and its error; None is the base itself.
    """
    value, error = estimate
    columns = _with_error(f"{value:.4f}", error)
    if difference is None:
        return columns + " " * _COLUMN_WIDTH
    value, error = difference
    return columns + _with_error(f"{value:+.4f}", error)


def difference_as_json(difference: tuple[float, float]) -> dict[str, float | None]:
    """Converts a difference and its standard error to what JSON can hold; NaN becomes None."""
    value, error = difference
    return {"difference": known(value), "difference_error": known(error)}


def known(value: float) -> float | None:
    """Returns a number as JSON can hold it: NaN becomes None."""
    return None if math.isnan(value) else value


def _with_error(value: str, error: float) -> str:
    """Writes a value and its error; where that is not known, blanks keep the column."""
    shown = "" if math.isnan(error) else f" +-{error:.4f}"
    return f"{value}{shown:<9}".rjust(_COLUMN_WIDTH)
