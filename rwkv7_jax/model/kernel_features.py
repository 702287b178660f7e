"""Kernel features of vectors: Gaussians around landmarks, or random Fourier features."""

import math
import typing
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Heads, describe_fields
from rwkv7_jax.model.remat import name_product

KINDS = ("gaussian", "fourier", "gaussian_raw")

# Minimum norms, by which shorter vectors are divided.
_SHORTEST_VECTOR = 1e-6
_SHORTEST_FEATURES = 1e-12


# jaxtyping would check these fields whenever JAX rebuilds the tree with other leaves (under `vmap`,
# `scan`, `eval_shape`). Here they are documentation, and `check_state` checks them.
@typing.no_type_check
@struct.dataclass
class Features:
    """A fixed nonlinear map of read vectors, for each layer and head; float32.

    Attributes:
        landmarks: points in the space of the read vectors; for Fourier features, the frequencies.
        widths: inverse squared widths of the Gaussians; for Fourier features, the phases.
        mean: the features' mean on calibration text, which is subtracted.
        map: a matrix that multiplies the centred features from the left, or None.
        kind: one of `KINDS`; all but "gaussian_raw" depend only on the direction of a vector.
    """

    landmarks: Float[Array, "L B H M N"]
    widths: Float[Array, "L B H M"]
    mean: Float[Array, "L B H M"]
    map: Float[Array, "L B H M M"] | None
    kind: str = struct.field(pytree_node=False, default="gaussian")
    __repr__ = describe_fields

    # `struct.dataclass` adds this method at run time, where type checkers do not see it.
    if typing.TYPE_CHECKING:

        def replace(self, **changes: Any) -> "Features":
            """Returns a copy with other values of some fields."""
            ...


def apply_per_head(
    maps: Float[Array, "B H O I"],
    x: Float[Array, "b T H I"],
) -> Float[Array, "b T H O"]:
    """Multiplies the vectors of each head by its matrix; with B = 1 all rows share the matrices."""
    # Without the axis B, shared matrices are not copied for every row.
    if maps.shape[0] == 1:
        product = jnp.einsum("bthi,hoi->btho", x, maps[0], precision="highest")
    else:
        product = jnp.einsum("bthi,bhoi->btho", x, maps, precision="highest")
    return name_product(product)


def unit_vectors(x: Float[Array, "... N"]) -> Float[Array, "... N"]:
    """Scales vectors to length 1, in float32."""
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # A maximum instead of adding epsilon: vectors of usual length are scaled exactly.
    return x * jax.lax.rsqrt(jnp.maximum(square, _SHORTEST_VECTOR**2))


def unit_features(phi: Float[Array, "... M"]) -> Float[Array, "... M"]:
    """Scales feature vectors to length 1."""
    square = jnp.sum(phi * phi, axis=-1, keepdims=True)
    return phi * jax.lax.rsqrt(jnp.maximum(square, _SHORTEST_FEATURES**2))


def kernel_features(features: Features, x: Heads) -> Float[Array, "B T H M"]:
    """Computes phi(x) in float32 with the features of one layer (without the axis L).

    Gaussians are exp(-width |x - landmark|^2), Fourier features sqrt(2 / M) cos(frequency x +
    phase). Both are then centred and multiplied by the map.

    Source: arXiv 2504.05097, section 3.2; Rahimi and Recht 2007 for the cosines.
    """
    if features.kind == "gaussian_raw":
        x = x.astype(jnp.float32)
    else:
        x = unit_vectors(x)
    # [B T H M]: the products with all landmarks or frequencies of the head.
    inner = apply_per_head(features.landmarks, x)
    widths = features.widths[:, None]
    if features.kind == "fourier":
        count = widths.shape[-1]
        phi = math.sqrt(2 / count) * jnp.cos(inner + widths)
    else:
        # |x - landmark|^2 from its three terms: the difference would be [B T H M N].
        landmarks_squared = jnp.sum(jnp.square(features.landmarks), axis=-1)[:, None]
        x_squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        phi = jnp.exp(-widths * (x_squared + landmarks_squared - 2 * inner))
    # Gaussians are positive: without centring they have a large common component.
    phi = phi - features.mean[:, None]
    if features.map is None:
        return phi
    return apply_per_head(features.map, phi)
