"""Frozen weights as 8-bit integers with one scale per output row.

The matrices that act as x W^T are quantized: the blocks' projections and the head. A product
multiplies by the integers, which every activation dtype represents exactly, and is scaled
afterwards. Other leaves stay as they are:

* Norms and vectors are small.
* The low-rank maps are 3 % of a 7.2B model and compute the decay, whose errors add up over tokens.
* The embedding's rows are read one by one, so no sum over inputs averages the quantization errors
  of a row with one large entry.
"""

import typing
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int8

from rwkv7_jax.array_types import Params, describe_fields

# The name of these weights in settings and arguments.
INT8 = "int8"

# Integers from -127 to 127: the range is symmetric.
_LARGEST = 127.0

# The last part of a matrix's path. Norms have it too, but their weights are vectors.
_MATRIX = "weight"

_EMBEDDING = "emb"


# Not checked at run time, for the reason given at `RWKV7State`.
@typing.no_type_check
@struct.dataclass
class Int8Matrix:
    """A matrix, or a stack of them, whose entry [o, i] is `values[o, i] * scale[o]`.

    Attributes:
        values: integers. They must be the first leaf: Flax compares its shape with the parameter's.
        scale: of each row, float32 and above 0.
        origin: hash of the model that the matrix is from; "" if unknown.
    """

    values: Int8[Array, "... O I"]
    scale: Float[Array, "... O"]
    origin: str = struct.field(pytree_node=False, default="")
    __repr__ = describe_fields

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return self.values.shape

    @property
    def size(self) -> int:
        """The number of entries of the matrix, without scales."""
        return self.values.size

    def dequantize(self) -> Float[Array, "... O I"]:
        """Computes the matrix in float32."""
        return self.values.astype(jnp.float32) * self.scale[..., None]


# A matrix that the model accepts.
Weight = Float[Array, "O I"] | Int8Matrix


def origin_of(params: Params) -> str | None:
    """Returns the hash of the model of 8-bit weights; None for other weights."""
    for leaf in jax.tree.leaves(params, is_leaf=is_int8):
        if isinstance(leaf, Int8Matrix):
            return leaf.origin
    return None


def is_int8(leaf: Any) -> bool:
    """Tells whether a node of a tree is an `Int8Matrix`; serves as `is_leaf`."""
    return isinstance(leaf, Int8Matrix)


def is_quantizable(path: tuple[str, ...], ndim: int) -> bool:
    """Tells whether a leaf is quantized: the head and the blocks' projections are.

    Args:
        path: of the leaf in the tree of weights.
        ndim: of the leaf.
    """
    axes = 3 if path[0] == "layers" else 2
    return path[-1] == _MATRIX and path[0] != _EMBEDDING and ndim == axes


def quantize_rows(weight: Float[Array, "... O I"], origin: str = "") -> Int8Matrix:
    """Quantizes each row to 255 levels between minus and plus its largest absolute value.

    The error is at most half a step. Subnormal entries count as 0, and a row of zeros stays zeros.

    Args:
        weight: finite.
        origin: hash of the model.
    """
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=-1, initial=0.0)
    # A product with the inverse: XLA's rounding of a division by a constant depends on the shape.
    # The minimum avoids a division by zero for rows of zeros.
    scale = jnp.maximum(largest * (1 / _LARGEST), jnp.finfo(jnp.float32).tiny)
    values = jnp.round(weight / scale[..., None]).astype(jnp.int8)
    return Int8Matrix(values=values, scale=scale, origin=origin)


def quantize(params: Params, origin: str = "") -> Params:
    """Converts the matrices of a tree of weights to 8 bits; other leaves stay as they are.

    It does not check for non-finite numbers; `load_model(..., weights="int8")` does.

    Args:
        params: weights, or their shapes under `jax.eval_shape`.
        origin: hash of the model.

    Raises:
        ValueError: a tree of variables, `{"params": ...}`, instead of the weights in it.
    """
    if "params" in params:
        raise ValueError(
            'quantize: `params` must be the inner tree of weights; got {"params": ...}.'
        )

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:
        names = tuple(key.key for key in path)
        if is_int8(leaf) or not is_quantizable(names, leaf.ndim):
            return leaf
        return quantize_rows(leaf, origin)

    return jax.tree_util.tree_map_with_path(convert, params, is_leaf=is_int8)


def dequantize(params: Params) -> Params:
    """Converts 8-bit matrices back to float32; other leaves stay as they are."""

    def convert(leaf: Any) -> Any:
        return leaf.dequantize() if is_int8(leaf) else leaf

    return jax.tree.map(convert, params, is_leaf=is_int8)
