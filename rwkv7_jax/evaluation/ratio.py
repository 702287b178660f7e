"""Ratios of sums over windows, rows or questions, with standard errors and paired differences."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from rwkv7_jax.checks import prefix_errors

_COLUMN_WIDTH = 18


@dataclasses.dataclass(frozen=True, eq=False)
class Ratio:
    """The numerators and denominators of a measured ratio, part by part.

    Attributes:
        totals: numerator of each part: its bits, or 1 for a correct answer.
        weights: denominator of each part: its bytes, or 1.
    """

    totals: Float[np.ndarray, " Q"]
    weights: Float[np.ndarray, " Q"]

    @property
    def value(self) -> float:
        """The ratio of the sums, in which short parts do not count more; NaN without weight."""
        return ratio(self.totals, self.weights)[0]

    @property
    def standard_error(self) -> float:
        """The standard error of `value` over parts; NaN for a single part."""
        return ratio(self.totals, self.weights)[1]

    def difference(self, base: "Ratio") -> tuple[float, float]:
        """Returns this value minus that of `base`, and the standard error over pairs of parts.

        A part that is equally hard for both adds nothing to the error of a paired difference.

        Raises:
            ValueError: the two do not cover the same parts.
        """
        with prefix_errors("Ratio.difference"):
            if not np.array_equal(self.weights, base.weights):
                raise ValueError(
                    "`base` must have the same parts, with the same weights; "
                    f"got {len(base.weights)} parts for {len(self.weights)}."
                )
        return ratio(self.totals - base.totals, self.weights)


def ratio(
    totals: Float[np.ndarray, " Q"], weights: Float[np.ndarray, " Q"]
) -> tuple[float, float]:
    """Returns a ratio of sums and its standard error; with weights of 1, those of a mean.

    Both are NaN if all weights are 0. The error is NaN for a single part.
    """
    count = len(totals)
    weight = weights.sum()
    # The mean of nothing is undefined; 0 would look perfect.
    if not weight:
        return math.nan, math.nan
    value = totals.sum() / weight
    if count < 2:
        return float(value), math.nan
    residuals = totals - value * weights
    variance = (residuals**2).sum() * count / (count - 1)
    return float(value), float(math.sqrt(variance) / weight)


def estimate_head(name: str) -> str:
    """Formats the heads of two columns: a value, and its difference from the base."""
    return f"{name:>{_COLUMN_WIDTH}}{'difference':>{_COLUMN_WIDTH}}"


def estimate_columns(value: float, row: Any, base: Any) -> str:
    """Formats a value and its difference from the base, each with its standard error if known.

    Args:
        value: the row's value.
        row: an object with `standard_error` and the method `difference`.
        base: the first row of the table, whose own difference is left blank.
    """
    columns = _with_error(f"{value:.4f}", row.standard_error)
    if row is base:
        return columns + " " * _COLUMN_WIDTH
    difference, error = row.difference(base)
    return columns + _with_error(f"{difference:+.4f}", error)


def difference_as_json(row: Any, base: Any) -> dict[str, float | None]:
    """Converts a row's difference from the base for JSON; empty for the base itself."""
    if row is base:
        return {}
    difference, error = row.difference(base)
    return {"difference": known(difference), "difference_error": known(error)}


def known(value: float) -> float | None:
    """Returns a number for JSON: NaN and infinities, which JSON lacks, become None."""
    return value if math.isfinite(value) else None


def _with_error(value: str, error: float) -> str:
    """Formats a value and its error; spaces keep the column if the error is unknown."""
    shown = "" if math.isnan(error) else f" +-{error:.4f}"
    return f"{value}{shown:<9}".rjust(_COLUMN_WIDTH)
