"""Dtypes and ranks that operands need next to each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def wide_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the dtype of sums: float32, or float64, in which laws are checked."""
    return jnp.promote_types(dtype, jnp.float32)


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Brings numbers to float32; float64 stays."""
    return x.astype(wide_dtype(x.dtype))


def at_least_int32(numbers: Any) -> Array:
    """Converts integers of fewer bits to int32.

    JAX gives a Python number the dtype of the array that it meets: in uint8, 256 is 0.
    """
    numbers = jnp.asarray(numbers)
    return numbers.astype(jnp.promote_types(numbers.dtype, jnp.int32))


def per_channel(
    vector: Float[Array, "..."],
    x: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Brings a vector to x's dtype and rank, so that it acts along x's last axes."""
    return jax.lax.broadcast_to_rank(vector.astype(x.dtype), x.ndim)
