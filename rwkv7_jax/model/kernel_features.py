"""Kernel features of vectors: Gaussians around landmarks, or random Fourier features."""

import math
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Heads, describe_fields
from rwkv7_jax.model.remat import name_product

# One number per feature for each token.
Reads = Float[Array, "B T H M"]

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
        kind: a name in `FEATURE_MAPS`; all but "gaussian_raw" depend only on a vector's direction.
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


def _gaussians(features: Features, x: Heads, inner: Reads) -> Reads:
    # |x - landmark|^2 from its three terms: the difference itself would be [B T H M N].
    landmarks_squared = jnp.sum(jnp.square(features.landmarks), axis=-1)[:, None]
    x_squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    widths = features.widths[:, None]
    return jnp.exp(-widths * (x_squared + landmarks_squared - 2 * inner))


def _cosines(features: Features, x: Heads, inner: Reads) -> Reads:
    phases = features.widths[:, None]
    return math.sqrt(2 / phases.shape[-1]) * jnp.cos(inner + phases)


# Feature maps by the names of `Features.kind`: functions of one layer's features, of x [B T H N]
# and of the products of x with the landmarks [B T H M], to [B T H M]. Further ones may be added.
# Compiled programs are cached by name, so a changed function needs a new name.
FEATURE_MAPS: dict[str, Callable[[Features, Heads, Reads], Reads]] = {
    "gaussian": _gaussians,
    "fourier": _cosines,
    "gaussian_raw": _gaussians,
}

# The feature maps of this package.
KINDS = tuple(FEATURE_MAPS)


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
    phi = FEATURE_MAPS[features.kind](features, x, inner)
    # Gaussians are positive: without centring they have a large common component.
    phi = phi - features.mean[:, None]
    if features.map is None:
        return phi
    return apply_per_head(features.map, phi)
