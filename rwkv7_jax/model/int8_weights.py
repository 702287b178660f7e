"""Frozen weights as 8-bit integers with one scale for each output row.

The matrices that act as x W^T are stored so: the blocks' projections and the head. A product is
made with the integers, which every activation dtype holds exactly, and is scaled afterwards.

Other leaves stay as they are: norms and vectors, which are small; the low-rank maps, 3 % of a 7.2B
model, which make the decay, where errors add up over tokens; and the embedding, whose rows are read
one by one, so that no sum over inputs averages the errors of a row with one large entry.
"""

import typing
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int8

from rwkv7_jax.array_types import Params, describe_fields

# The name of this form of weights in settings and arguments.
INT8 = "int8"

# Integers from -127 to 127: -128 would have no counterpart.
_LARGEST = 127.0

# The last part of a matrix's path in the tree. Norms have it too, but theirs are vectors.
_MATRIX = "weight"

_EMBEDDING = "emb"


# Not checked at run time, for the reason given at `RWKV7State`.
@typing.no_type_check
@struct.dataclass
class Int8Matrix:
    """A matrix, or a stack of them, whose entry [o, i] is `values[o, i] * scale[o]`.

    Attributes:
        values: integers. The first leaf: Flax compares its shape with that of the parameter.
        scale: of each row, float32 and above 0.
        origin: hash of the model that the matrix is from; "" where that is not known.
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
        """The numbers of the matrix; scales are not counted."""
        return self.values.size

    def dequantize(self) -> Float[Array, "... O I"]:
        """Computes the matrix in float32."""
        return self.values.astype(jnp.float32) * self.scale[..., None]


# A matrix as the model takes it.
Weight = Float[Array, "O I"] | Int8Matrix


def origin_of(params: Params) -> str | None:
    """Returns the hash of the model that 8-bit weights are from; None for other weights."""
    for leaf in jax.tree.leaves(params, is_leaf=is_int8):
        if isinstance(leaf, Int8Matrix):
            return leaf.origin
    return None


def is_int8(leaf: Any) -> bool:
    """Tells whether a node of a tree is a matrix in 8 bits; as `is_leaf` it keeps them whole."""
    return isinstance(leaf, Int8Matrix)


def is_quantizable(path: tuple[str, ...], ndim: int) -> bool:
    """Tells whether a leaf is stored in 8 bits: the head, and the blocks' projections.

    Args:
        path: in the tree of weights.
        ndim: of the leaf.
    """
    axes = 3 if path[0] == "layers" else 2
    return path[-1] == _MATRIX and path[0] != _EMBEDDING and ndim == axes


def quantize_rows(weight: Float[Array, "... O I"], origin: str = "") -> Int8Matrix:
    """Rounds each row to 255 steps between its largest absolute value and that value's negative.

    An entry is off by half a step at most; subnormal ones count as 0. A row of zeros stays zeros.

    Args:
        weight: finite.
        origin: hash of the model.
    """
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=-1, initial=0.0)
    # Times the inverse: XLA rounds a division by a constant differently in other shapes. Above 0,
    # so that a row of zeros is divided as any other.
    scale = jnp.maximum(largest * (1 / _LARGEST), jnp.finfo(jnp.float32).tiny)
    values = jnp.round(weight / scale[..., None]).astype(jnp.int8)
    return Int8Matrix(values=values, scale=scale, origin=origin)


def quantize(params: Params, origin: str = "") -> Params:
    """Converts the matrices of a tree of weights to 8 bits; other leaves stay as they are.

    It checks no numbers; `load_model(..., weights="int8")` does.

    Args:
        params: weights, or their shapes under `jax.eval_shape`.
        origin: hash of the model.

    Raises:
        ValueError: a tree of variables, `{"params": ...}`, in place of the weights inside.
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
    """Converts the matrices in 8 bits back to float32; other leaves stay as they are."""

    def convert(leaf: Any) -> Any:
        return leaf.dequantize() if is_int8(leaf) else leaf

    return jax.tree.map(convert, params, is_leaf=is_int8)
