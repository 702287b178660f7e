"""Norms over all channels and over each head, computed in float32."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rwkv7_jax.model.casts import per_channel, widened
from rwkv7_jax.model.head_sums import HeadView, spread_over_heads, sum_heads

# The minimum norm, by which shorter heads are divided.
_SHORTEST_HEAD = 1e-12


def standardise(x: Float[Array, "... N"], eps: float) -> Float[Array, "... N"]:
    """Scales to zero mean and unit variance (biased) over the last axis, in float32."""
    wide = widened(x)
    # Centred first: E[x^2] - E[x]^2 would lose precision for activations far from zero.
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(variance + eps)


# Saves only x for the backward pass, in its own dtype.
@functools.partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
def layer_norm(
    x: Float[Array, "... D"],
    weight: Float[Array, " D"],
    bias: Float[Array, " D"],
    eps: float,
) -> Float[Array, "... D"]:
    """Normalises over the last axis, then scales and shifts, in float32."""
    wide = standardise(x, eps)
    scale = per_channel(weight, wide)
    shift = per_channel(bias, wide)
    return (wide * scale + shift).astype(x.dtype)


def group_norm(
    y: HeadView,
    weight: Float[Array, " D"],
    bias: Float[Array, " D"],
    eps: float,
    *,
    head_size: int,
) -> HeadView:
    """Normalises each head of each token; scale and shift are per channel.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/rwkv_v7_demo.py:285.
    """
    wide = widened(y)
    # Centred first, as in `standardise`.
    mean = sum_heads(wide, head_size, y.dtype) / head_size
    wide = wide - spread_over_heads(mean, head_size, y.dtype)
    variance = sum_heads(jnp.square(wide), head_size, y.dtype) / head_size
    inverse = jax.lax.rsqrt(variance + eps)
    wide = wide * spread_over_heads(inverse, head_size, y.dtype)
    scale = per_channel(weight.reshape(y.shape[2:]), wide)
    shift = per_channel(bias.reshape(y.shape[2:]), wide)
    return (wide * scale + shift).astype(y.dtype)


def unit_heads(x: HeadView, head_size: int) -> HeadView:
    """Scales every head to length 1; a head shorter than 1e-12 is divided by 1e-12.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/rwkv_v7_numpy.py:37 (torch's `normalize`).
    """
    wide = widened(x)
    square = sum_heads(jnp.square(wide), head_size, x.dtype)
    # The maximum is under the root, so a vector of zeros has a finite gradient.
    inverse_length = jax.lax.rsqrt(jnp.maximum(square, _SHORTEST_HEAD**2))
    inverse_length = spread_over_heads(inverse_length, head_size, x.dtype)
    return (wide * inverse_length).astype(x.dtype)
