"""Axis letters of all shapes in this package, and common type aliases.

B batch, T tokens, L layers, D width, H heads, N head size, `Nk` key channels (columns of a state),
`Nv` value channels (rows of a state), F feed-forward width, R low rank, C chunk, V vocabulary,
M kernel features.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

Tokens = Int[Array | np.ndarray, "B T"]

# The number of valid tokens of each row; padding is on the right.
Lengths = Int[Array | np.ndarray, " B"]

# The sequence that each token of a packed row belongs to, numbered from 0 in each row.
SegmentIds = Int[Array | np.ndarray, "B T"]

Activations = Float[Array, "B T D"]

Heads = Float[Array, "B T H N"]

Logits = Float[Array, "B T V"]

# Nested dicts of weights. Their paths are the official checkpoint names, with the first block under
# `layer_0` and the other blocks stacked under `layers`.
Params = dict[str, Any]


class _ArraySummary:
    """A stand-in for an array that prints dtype and shape."""

    def __init__(self, array: Any):
        """Describes an array by dtype and shape, and any other value by its own `repr`."""
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            self._text = repr(array)
            return
        # The `repr` of an array copies its values from the device.
        sizes = ",".join(map(str, array.shape))
        self._text = f"{array.dtype}[{sizes}]"

    def __repr__(self) -> str:
        """Returns the description."""
        return self._text


def describe_fields(self: Any) -> str:
    """Describes a dataclass of pytrees by dtypes and shapes instead of values.

    Serves as `__repr__`, because the values of a state fill screens. Fields with `repr=False` are
    left out.
    """
    parts = []
    for field in dataclasses.fields(self):
        if not field.repr:
            continue
        tree = jax.tree.map(_ArraySummary, getattr(self, field.name))
        parts.append(f"{field.name}={tree!r}")
    return f"{type(self).__name__}({', '.join(parts)})"
