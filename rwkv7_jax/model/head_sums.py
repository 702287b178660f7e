"""Sums over the channels of each head, in the best layout for the device.

To sum an array [B T H N] over N, XLA for TPU stores it with the tokens as the minor axis. The WKV
kernels and the matrix products need the channels there, so XLA copies the array from one layout to
the other. On TPU, activations therefore keep the shape [B T D], and a sum over each head is a
matrix product with a [D H] matrix of zeros and ones. Other devices sum the last axis of [B T H N],
which XLA fuses with the surrounding operations.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import platforms

# [B T D] or [B T H N].
HeadView = Float[Array, "B T ..."]


def view_heads(x: HeadView, head_size: int) -> HeadView:
    """Reshapes x to the axes in which this device sums heads."""
    width = math.prod(x.shape[2:])
    shape = (width // head_size, head_size)
    if platforms.target_platform() == "tpu":
        shape = (width,)
    return x.reshape(*x.shape[:2], *shape)


def sum_heads(x: HeadView, head_size: int, dtype: DTypeLike) -> HeadView:
    """Sums the channels of each head: [B T D] to [B T H], or [B T H N] to [B T H 1].

    Args:
        x: all channels, in the shape of `view_heads`.
        head_size: channels of a head.
        dtype: of the activations from which x was computed. It sets the precision of the products
            on TPU: a float32 sum has at least 16 correct bits for 16-bit activations, and full
            precision otherwise. The sum has x's dtype.
    """
    if x.ndim == 4:
        return jnp.sum(x, axis=-1, keepdims=True)
    return _multiply(x, _membership(x.shape[2], head_size), dtype)


def spread_over_heads(x: HeadView, head_size: int, dtype: DTypeLike) -> HeadView:
    """Broadcasts one number per head, as `sum_heads` returns it, to the head's channels."""
    if x.ndim == 4:
        return x
    return _multiply(x, _membership(x.shape[2] * head_size, head_size).T, dtype)


def _membership(width: int, head_size: int) -> np.ndarray:
    """Makes a [D H] mask of the channels that belong to each head."""
    return np.arange(width)[:, None] // head_size == np.arange(width // head_size)


def _multiply(x: Array, matrix: np.ndarray, dtype: DTypeLike) -> Array:
    # A TPU computes float32 products as one ("default"), three ("high") or six ("highest") products
    # of bfloat16 parts.
    is_short = jnp.dtype(dtype).itemsize < 4
    return jnp.matmul(
        x, jnp.asarray(matrix, x.dtype), precision="high" if is_short else "highest"
    )
