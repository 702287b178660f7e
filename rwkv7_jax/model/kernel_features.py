"""Kernel features of vectors: Gaussians around landmarks, or random Fourier features."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Heads
from rwkv7_jax.model.state import Features

# Directions are x / max(|x|, this).
_SHORTEST = 1e-6


def _apply(maps: Float[Array, "B H O I"], x: Float[Array, "b T H I"]) -> Float[Array, "b T H O"]:
    """Each head's matrix times its vectors; one matrix may serve all rows."""
    if maps.shape[0] == 1:
        return jnp.einsum("bthi,hoi->btho", x, maps[0], precision="highest")
    return jnp.einsum("bthi,bhoi->btho", x, maps, precision="highest")


def unit_vectors(x: Float[Array, "... N"]) -> Float[Array, "... N"]:
    """x / |x| in float32."""
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, _SHORTEST**2))


def kernel_features(features: Features, x: Heads) -> Float[Array, "B T H M"]:
    """phi(x) of one layer, float32: Gaussians around landmarks, or cosines; centred and mapped.

    Source: arXiv 2504.05097, section 3.2; Rahimi and Recht 2007 for the cosines.
    """
    x = x.astype(jnp.float32) if features.kind == "gaussian_raw" else unit_vectors(x)
    inner = _apply(features.landmarks, x)
    widths = features.widths[:, None]
    if features.kind == "fourier":
        phi = math.sqrt(2 / widths.shape[-1]) * jnp.cos(inner + widths)
    else:
        lengths = jnp.sum(jnp.square(features.landmarks), axis=-1)[:, None]
        square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        phi = jnp.exp(-widths * (square + lengths - 2 * inner))
    phi = phi - features.mean[:, None]
    return phi if features.map is None else _apply(features.map, phi)


def _unit(x: Float[Array, "... M"]) -> Float[Array, "... M"]:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
