"""Casts and broadcasts of operands."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def wide_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the dtype of sums: float32, or float64 for float64 inputs, as in tests."""
    return promoted(dtype, jnp.float32)


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Casts to float32; float64 stays."""
    return x.astype(wide_dtype(x.dtype))


def at_least_int32(numbers: Any) -> Array:
    """Converts integers with fewer than 32 bits to int32.

    JAX casts a Python integer to the dtype of the array that it is combined with: in uint8, 256
    becomes 0.
    """
    numbers = jnp.asarray(numbers)
    return numbers.astype(promoted(numbers.dtype, jnp.int32))


def promoted(*dtypes: DTypeLike) -> np.dtype:
    """Returns the dtype that holds all of several, also where promotion is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return np.dtype(functools.reduce(jnp.promote_types, dtypes))


def per_channel(
    vector: Float[Array, "..."],
    x: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Casts a vector to x's dtype and broadcasts it to x's rank, along x's last axes."""
    return jax.lax.broadcast_to_rank(vector.astype(x.dtype), x.ndim)
