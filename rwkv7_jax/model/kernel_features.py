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

# The length by which shorter vectors are divided instead of by their own.
_SHORTEST_VECTOR = 1e-6
_SHORTEST_FEATURES = 1e-12


# The shaped fields would be checked whenever JAX rebuilds the tree with other leaves (under `vmap`,
# `scan`, `eval_shape`), so they are documentation here and checked by `check_state` instead.
@typing.no_type_check
@struct.dataclass
class Features:
    """A fixed nonlinear map of read vectors, for each layer and head; float32.

    Attributes:
        landmarks: points in the space of the read vectors; for Fourier features, the frequencies.
        widths: inverse squared widths of the Gaussians; for Fourier features, the phases.
        mean: the mean on calibration text, which is subtracted.
        map: a matrix by which the centred features are multiplied from the left, or None.
        kind: one of `KINDS`; all but "gaussian_raw" see only the direction of a vector.
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
    # Without an axis B in the product: shared matrices are not copied for every row.
    if maps.shape[0] == 1:
        product = jnp.einsum("bthi,hoi->btho", x, maps[0], precision="highest")
    else:
        product = jnp.einsum("bthi,bhoi->btho", x, maps, precision="highest")
    return name_product(product)


def unit_vectors(x: Float[Array, "... N"]) -> Float[Array, "... N"]:
    """Scales vectors to length 1, in float32."""
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # A maximum and not a sum with epsilon: vectors of usual length are scaled exactly.
    return x * jax.lax.rsqrt(jnp.maximum(square, _SHORTEST_VECTOR**2))


def unit_features(phi: Float[Array, "... M"]) -> Float[Array, "... M"]:
    """Scales feature vectors to length 1."""
    square = jnp.sum(phi * phi, axis=-1, keepdims=True)
    return phi * jax.lax.rsqrt(jnp.maximum(square, _SHORTEST_FEATURES**2))


def kernel_features(features: Features, x: Heads) -> Float[Array, "B T H M"]:
    """Computes phi(x), float32, with the features of one layer (without the axis L).

    Gaussians are exp(-width |x - landmark|^2), cosines sqrt(2 / M) cos(frequency x + phase). Both
    are then centred and multiplied by the map.

    Source: arXiv 2504.05097, section 3.2; Rahimi and Recht 2007 for the cosines.
    """
    if features.kind == "gaussian_raw":
        x = x.astype(jnp.float32)
    else:
        x = unit_vectors(x)
    # [B T H M]: the products with all landmarks of the head, or with all frequencies.
    inner = apply_per_head(features.landmarks, x)
    widths = features.widths[:, None]
    if features.kind == "fourier":
        count = widths.shape[-1]
        phi = math.sqrt(2 / count) * jnp.cos(inner + widths)
    else:
        # |x - landmark|^2 from its three terms: the difference itself would be [B T H M N].
        landmarks_squared = jnp.sum(jnp.square(features.landmarks), axis=-1)[:, None]
        x_squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        phi = jnp.exp(-widths * (x_squared + landmarks_squared - 2 * inner))
    # Gaussians are all positive: without centring they share one large common part.
    phi = phi - features.mean[:, None]
    if features.map is None:
        return phi
    return apply_per_head(features.map, phi)
