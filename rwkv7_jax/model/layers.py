"""The arithmetic of the model outside the recurrence, as pure functions."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import platforms
from rwkv7_jax.array_types import Activations, Lengths, Tokens
from rwkv7_jax.checks import as_array, check_lengths, is_traced
from rwkv7_jax.model import segments as segments_of_rows
from rwkv7_jax.model import time_shards
from rwkv7_jax.model.head_sums import HeadView, spread_over_heads, sum_heads
from rwkv7_jax.model.int8_weights import Int8Matrix, Weight
from rwkv7_jax.model.remat import name_product
from rwkv7_jax.model.segments import Segments
from rwkv7_jax.sharding import time_axis

# The largest decay rate: w = exp(-DECAY_RATE * sigmoid(z)) stays above 0.5452.
DECAY_RATE = 0.6065306597126334  # exp(-1/2)

# Up to so many rows, reading a weight takes longer than multiplying by it.
_MOST_ROWS = 64

# XLA for GPUs makes one kernel of a row's product with so many columns, and two of one with more.
_MOST_COLUMNS = 96

# The length by which shorter heads are divided instead of by their own.
_SHORTEST_HEAD = 1e-12


def at_least_int32(numbers: Any) -> Array:
    """Converts integers of fewer bits to int32.

    JAX gives a Python number the dtype of the array that it meets: in uint8, 256 is 0.
    """
    numbers = jnp.asarray(numbers)
    return numbers.astype(jnp.promote_types(numbers.dtype, jnp.int32))


def safe_lengths(lengths: Any, tokens: tuple[int, int]) -> Any:
    """Returns lengths from 0 to T: concrete ones are checked, traced ones are clipped.

    Args:
        lengths: the number of tokens of each row that count.
        tokens: the number of rows and the number of tokens in a row (T).

    Raises:
        TypeError: the lengths are not integers.
        ValueError: there is not one length for each row, or one is out of range.
    """
    lengths = as_array(lengths, "`lengths`")
    check_lengths(lengths, tokens)
    lengths = at_least_int32(lengths)
    if not is_traced(lengths):
        return lengths
    # A length out of range would gather a token shift from nowhere: NaN, or another row's end.
    return jnp.clip(lengths, 0, tokens[1])


def embed(tokens: Tokens, table: Float[Array, "V D"]) -> Activations:
    """Looks up the tokens' rows of the table; ids out of range get zeros."""
    # Plain indexing would clamp an id that is too large, and count a negative one from the end.
    return table.at[tokens].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def linear(
    x: Float[Array, "... I"],
    weight: Weight,
) -> Float[Array, "... O"]:
    """Computes x W^T in x's dtype; float32 means float32 on every device."""
    if isinstance(weight, Int8Matrix):
        return name_product(_int8_product(x, weight, x.dtype))
    return name_product(_product(x, weight.astype(x.dtype)).astype(x.dtype))


def project(
    x: Float[Array, "... I"],
    weight: Float[Array, "I O"],
) -> Float[Array, "... O"]:
    """Computes x W in x's dtype, for the low-rank matrices, which act from the right."""
    columns = weight.shape[-1]
    if _is_one_token_on_gpu(x) and _MOST_COLUMNS < columns <= 2 * _MOST_COLUMNS:
        # A kernel has room for the sums of two such halves; three parts would be two again.
        halves = jnp.array_split(weight, 2, axis=-1)
        return jnp.concatenate([project(x, half) for half in halves], axis=-1)
    product = jnp.matmul(
        x,
        weight.astype(x.dtype),
        precision=precision(x.dtype),
        preferred_element_type=_sum_dtype(x),
    )
    return name_product(product.astype(x.dtype))


# Only the integers are stored for the backward pass. Left alone, the gradient of a scan over layers
# stores what the tangents do not depend on: a float copy of every layer's weights.
@functools.partial(jax.checkpoint, static_argnums=2)
def _int8_product(x: Float[Array, "... I"], weight: Int8Matrix, dtype) -> Array:
    """Computes x W^T from integers in x's dtype, and scales the result in float32.

    Args:
        x: of the activations' dtype, which holds the integers exactly.
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
        dtype: of the result; by default the one that few rows are summed in, or x's.
    """
    product = functools.partial(
        jnp.einsum,
        precision=precision(x.dtype),
        preferred_element_type=_sum_dtype(x) or dtype,
    )
    if _is_step(x) and _rows(x) > 1 and platforms.target_platform() == "cpu":
        turned = product("oi,bi->ob", weight, x.reshape(-1, x.shape[-1]))
        # XLA would turn the product back, and then copy all of the weights into another order.
        turned = jax.lax.optimization_barrier(turned)
        return turned.T.reshape(*x.shape[:-1], weight.shape[0])
    return product("...i,oi->...o", x, weight)


def _rows(x: Array) -> int:
    return math.prod(x.shape[:-1])


def _is_step(x: Array) -> bool:
    """Tells whether x [... T I] is one token of each of a few rows, as decoding reads it."""
    return x.ndim > 1 and x.shape[-2] == 1 and _rows(x) <= _MOST_ROWS


def read_together(
    arrays: Sequence[Float[Array, "B T _"]],
) -> tuple[Float[Array, "B T _"], ...]:
    """Returns the arrays; those of one token on a GPU as parts of one array.

    A kernel takes longer to start there than to multiply one row. XLA makes one kernel of products
    that read the same array, and none of those that only look alike.
    """
    if not _is_one_token_on_gpu(arrays[0]):
        return tuple(arrays)
    # Otherwise every product would compute its part again.
    joined = jax.lax.optimization_barrier(jnp.concatenate([x.ravel() for x in arrays]))
    ends = np.cumsum([x.size for x in arrays])
    parts = jnp.split(joined, ends[:-1])
    return tuple(part.reshape(x.shape) for part, x in zip(parts, arrays, strict=True))


def _is_one_token_on_gpu(x: Array) -> bool:
    """Tells whether x [... T D] is a single token of a single row, for a GPU."""
    return _is_step(x) and _rows(x) == 1 and platforms.target_platform() == "cuda"


def _sum_dtype(x: Array) -> DTypeLike | None:
    """Returns the dtype to sum 16-bit products of a step in; None leaves it to the compiler.

    For GPUs, XLA makes a product with one row of multiplications, whose results it would round to
    16 bits before the sum. Products with many rows are summed in float32 anyway; asked for it, the
    gradient would multiply float32 by 16 bits.
    """
    return jnp.float32 if jnp.dtype(x.dtype).itemsize < 4 and _is_step(x) else None


def precision(dtype) -> str:
    """Returns the precision of products: full for float32, one pass for 16-bit operands.

    Left alone, GPU and TPU would shorten float32 operands to TF32 or bfloat16.
    """
    return "highest" if dtype == jnp.float32 else "default"


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Brings numbers to float32; float64, in which laws are checked, stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def per_channel(
    vector: Float[Array, "..."],
    x: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Brings a vector to x's dtype and rank, so that it acts along x's last axes."""
    return jax.lax.broadcast_to_rank(vector.astype(x.dtype), x.ndim)


def standardise(x: Float[Array, "... N"], eps: float) -> Float[Array, "... N"]:
    """Scales to zero mean and unit variance (biased) over the last axis, in float32."""
    wide = widened(x)
    # Centred first: E[x^2] - E[x]^2 would lose the digits of activations far from zero.
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(variance + eps)


# Only x is stored for the backward pass, in its own dtype.
@functools.partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
def layer_norm(
    x: Float[Array, "... D"],
    weight: Float[Array, " D"],
    bias: Float[Array, " D"],
    eps: float,
) -> Float[Array, "... D"]:
    """Normalises over the last axis, then scales and shifts; all of it in float32."""
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
    """Normalises each head of each token on its own; scale and shift run over all channels.

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
    # The maximum is taken under the root, where a vector of zeros still has a finite gradient.
    inverse_length = jax.lax.rsqrt(jnp.maximum(square, _SHORTEST_HEAD**2))
    inverse_length = spread_over_heads(inverse_length, head_size, x.dtype)
    return (wide * inverse_length).astype(x.dtype)


def token_before(x: Activations, before: Float[Array, "S D"]) -> Float[Array, "S D"]:
    """Returns what comes before this device's tokens; `before`, from the state, on one device."""
    axis = time_axis()
    return before if axis is None else time_shards.previous_token(x, before, axis)


def previous_tokens(
    x: Activations,
    before: Float[Array, "S D"],
    segments: Segments | None = None,
) -> Activations:
    """Shifts by one token; the first one's predecessor is `before`, from the state."""
    if segments is not None:
        return segments_of_rows.shift(x, before, segments)
    # [B T+1 D]; its first T tokens are the predecessors.
    both = jnp.concatenate([before[:, None].astype(x.dtype), x], axis=1)
    return both[:, : x.shape[1]]


def last_token(
    x: Activations,
    before: Float[Array, "S D"],
    lengths: Lengths | None,
    segments: Segments | None = None,
) -> Float[Array, "S D"]:
    """Takes the last token that counts of every sequence; `before` where none does."""
    if segments is not None:
        return segments_of_rows.last_tokens(x, before, segments)
    axis = time_axis()
    if axis is None and lengths is not None and _is_one_token_on_gpu(x):
        # Number by number, so that XLA writes the new state in the old one's place.
        return jnp.where(lengths[:, None] > 0, x[:, 0], before.astype(x.dtype))
    # With `before` in front, position n holds the last of n tokens, also for n = 0.
    both = jnp.concatenate([before[:, None].astype(x.dtype), x], axis=1)
    if lengths is None:
        last = both[:, -1]
    else:
        last = jnp.take_along_axis(both, lengths[:, None, None], axis=1)[:, 0]
    if axis is None:
        return last
    return time_shards.from_last_token(last, lengths, x.shape[1], axis)


def lerp(
    x: Activations,
    shifted: Activations,
    coefficient: Float[Array, " D"],
) -> Activations:
    """Interpolates: x where the coefficient is 0, the previous token where it is 1."""
    coefficient = per_channel(coefficient, x)
    return x + (shifted - x) * coefficient


def log_decay(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes log w from the raw decay logit, float32, in (-0.6066, 0).

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/cuda/rwkv7_clampw.cu:16,42.
    """
    # With the 8 bits of bfloat16, the error of log w would add up over thousands of tokens.
    return -DECAY_RATE * jax.nn.sigmoid(widened(z))


def head_logits(
    x: Float[Array, "... D"],
    weight: Weight,
) -> Float[Array, "... V"]:
    """Computes float32 logits from operands in the activations' dtype."""
    # Of float64, which laws are checked in, float64.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if isinstance(weight, Int8Matrix):
        return _int8_product(x, weight, wide)
    return _product(x, weight.astype(x.dtype), wide)
