"""Sums over the channels of each head, in the layout that suits the device.

To sum an array [B T H N] over N, XLA for TPU stores it with the tokens as the minor axis. The WKV
kernels and the matrix products need the channels there, so XLA copies the array from one layout to
the other. On TPU activations therefore keep the shape [B T D], and a sum over each head is a matrix
product with a [D H] matrix of zeros and ones. Other devices sum the last axis of [B T H N], which
XLA fuses with the operations around it.
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
    """Returns x with the axes in which this device sums heads."""
    width = math.prod(x.shape[2:])
    shape = (width // head_size, head_size)
    # Single tokens, which decoding reads, need no copies.
    if platforms.target_platform() == "tpu" and x.shape[1] != 1:
        shape = (width,)
    return x.reshape(*x.shape[:2], *shape)


def sum_heads(x: HeadView, head_size: int, dtype: DTypeLike) -> HeadView:
    """Sums the channels of each head: of [B T D] to [B T H], of [B T H N] to [B T H 1].

    Args:
        x: numbers of all channels, as `view_heads` returns them.
        head_size: channels of a head.
        dtype: of the activations from which x was computed. It only sets how exact the products on
            TPU are: a float32 sum has at least 16 correct bits where the activations have 16 bits,
            and all its bits otherwise. The sum itself has x's dtype.
    """
    if x.ndim == 4:
        return jnp.sum(x, axis=-1, keepdims=True)
    return _multiply(x, _membership(x.shape[2], head_size), dtype)


def spread_over_heads(x: HeadView, head_size: int, dtype: DTypeLike) -> HeadView:
    """Brings one number a head, as `sum_heads` returns it, to a shape that acts on its channels."""
    if x.ndim == 4:
        return x
    return _multiply(x, _membership(x.shape[2] * head_size, head_size).T, dtype)


def _membership(width: int, head_size: int) -> np.ndarray:
    """Makes [D H] of booleans: which channel belongs to which head."""
    return np.arange(width)[:, None] // head_size == np.arange(width // head_size)


def _multiply(x: Array, matrix: np.ndarray, dtype: DTypeLike) -> Array:
    # A TPU multiplies float32 numbers as one ("default"), three ("high") or six ("highest")
    # products of their parts in bfloat16. Numbers in bfloat16 have one part and need no more.
    is_short = jnp.dtype(dtype).itemsize < 4
    return jnp.matmul(
        x, jnp.asarray(matrix, x.dtype), precision="high" if is_short else "highest"
    )
