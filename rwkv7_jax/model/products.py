"""Products with weights, and their adaptations to each kind of device."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import platforms
from rwkv7_jax.model.casts import per_channel, wide_dtype
from rwkv7_jax.model.int8_weights import Int8Matrix, Weight
from rwkv7_jax.model.remat import name_product

# Up to this many rows, reading a weight takes longer than multiplying by it.
_MOST_ROWS = 64

# Up to this many columns, XLA for GPUs computes a single row's product in one kernel; beyond, in
# two.
_MOST_COLUMNS = 96

# Rows of a TPU's tile. XLA's programs for fewer take more time.
TPU_ROWS = 8


def linear(
    x: Float[Array, "... I"],
    weight: Weight,
) -> Float[Array, "... O"]:
    """Computes x W^T in x's dtype; float32 products have full precision on every device."""
    if isinstance(weight, Int8Matrix):
        return name_product(_int8_product(x, weight, x.dtype))
    return name_product(_product(x, weight.astype(x.dtype)).astype(x.dtype))


def project(
    x: Float[Array, "... I"],
    weight: Float[Array, "I O"],
) -> Float[Array, "... O"]:
    """Computes x W in x's dtype, for the low-rank matrices."""
    columns = weight.shape[-1]
    if is_one_token_on_gpu(x) and _MOST_COLUMNS < columns <= 2 * _MOST_COLUMNS:
        # XLA fits two halves into one kernel, but not three parts.
        halves = jnp.array_split(weight, 2, axis=-1)
        return jnp.concatenate([project(x, half) for half in halves], axis=-1)
    product = functools.partial(
        jnp.matmul,
        precision=precision(x.dtype),
        preferred_element_type=_sum_dtype(x),
    )
    result = _multiply_rows(x, lambda rows: product(rows, weight.astype(x.dtype)))
    return name_product(result.astype(x.dtype))


def head_logits(
    x: Float[Array, "... D"],
    weight: Weight,
) -> Float[Array, "... V"]:
    """Computes float32 logits from operands in the activations' dtype."""
    wide = wide_dtype(x.dtype)
    if isinstance(weight, Int8Matrix):
        return _int8_product(x, weight, wide)
    return _product(x, weight.astype(x.dtype), wide)


# Saves only the integers for the backward pass. Without the checkpoint, the gradient of a scan over
# layers would save a float copy of every layer's weights.
@functools.partial(jax.checkpoint, static_argnums=2)
def _int8_product(x: Float[Array, "... I"], weight: Int8Matrix, dtype) -> Array:
    """Computes x W^T from integers in x's dtype, and scales the result in float32.

    Args:
        x: in the activations' dtype, which represents the integers exactly.
        weight: one matrix.
        dtype: of the product and of the result.
    """
    product = _product(x, weight.values.astype(x.dtype), dtype).astype(jnp.float32)
    return (product * per_channel(weight.scale, product)).astype(dtype)


def _product(
    x: Float[Array, "... I"], weight: Float[Array, "O I"], dtype=None
) -> Float[Array, "... O"]:
    """Computes x W^T.

    Args:
        x: rows.
        weight: of x's dtype.
        dtype: of the result; by default `_sum_dtype`, or x's.
    """
    product = functools.partial(
        jnp.einsum,
        precision=precision(x.dtype),
        preferred_element_type=_sum_dtype(x) or dtype,
    )
    if _is_step(x) and _rows(x) > 1 and platforms.target_platform() == "cpu":
        transposed = product("oi,bi->ob", weight, x.reshape(-1, x.shape[-1]))
        # Otherwise XLA undoes the transposition and copies all weights to another layout.
        transposed = jax.lax.optimization_barrier(transposed)
        return transposed.T.reshape(*x.shape[:-1], weight.shape[0])
    return _multiply_rows(x, lambda rows: product("...i,oi->...o", rows, weight))


def _multiply_rows(
    x: Float[Array, "... I"], multiply: Callable[[Array], Array]
) -> Float[Array, "... O"]:
    """Multiplies x's rows by a weight; a TPU gets a tile of rows where x has a single one.

    XLA for TPU computes a product with a single row on its vector units, which takes longer than
    reading the weight (`benchmarks.decode_tpu`). With more rows it uses the matrix units.
    """
    is_single = _is_step(x) and _rows(x) == 1
    if not is_single or platforms.target_platform() != "tpu":
        return multiply(x)
    others = [(0, 0)] * (x.ndim - 1)
    return multiply(jnp.pad(x, [(0, TPU_ROWS - 1), *others]))[:1]


def _rows(x: Array) -> int:
    return math.prod(x.shape[:-1])


def _is_step(x: Array) -> bool:
    """Tells whether x [... T I] is one token of each of a few rows, as in decoding."""
    if x.ndim < 2 or x.shape[-2] != 1:
        return False
    rows = _rows(x)
    # A symbolic dimension of `jax.export` may have any size.
    return not jax.export.is_symbolic_dim(rows) and rows <= _MOST_ROWS


def share_buffer_of_one_token(
    arrays: Sequence[Float[Array, "B T _"]],
) -> tuple[Float[Array, "B T _"], ...]:
    """Returns the arrays; a single token's on a GPU become parts of one array.

    Launching a kernel there takes longer than multiplying one row. XLA merges products into one
    kernel only if they read the same array.
    """
    if not is_one_token_on_gpu(arrays[0]):
        return tuple(arrays)
    # Without the barrier, every product would recompute its part.
    joined = jax.lax.optimization_barrier(jnp.concatenate([x.ravel() for x in arrays]))
    ends = np.cumsum([x.size for x in arrays])
    parts = jnp.split(joined, ends[:-1])
    return tuple(part.reshape(x.shape) for part, x in zip(parts, arrays, strict=True))


def is_one_token_on_gpu(x: Array) -> bool:
    """Tells whether x [... T D] is a single token of a single row and the target is a GPU."""
    return _is_step(x) and _rows(x) == 1 and platforms.target_platform() == "cuda"


def _sum_dtype(x: Array) -> DTypeLike | None:
    """Returns the dtype in which a step's 16-bit products are summed; None for the default.

    For GPUs, XLA computes a product with one row as multiplications, whose results it would round
    to 16 bits before the sum. Products with many rows are summed in float32 anyway. Requesting it
    there would make the gradient multiply float32 by 16-bit operands.
    """
    return jnp.float32 if jnp.dtype(x.dtype).itemsize < 4 and _is_step(x) else None


def precision(dtype) -> str:
    """Returns the precision of products: full for float32, one pass for 16-bit operands.

    By default, GPUs and TPUs round float32 operands to TF32 or bfloat16.
    """
    return "highest" if dtype == jnp.float32 else "default"
