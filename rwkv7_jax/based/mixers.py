"""The arithmetic of short convolutions and window attention, as pure functions."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.eager import compiled_when_eager
from rwkv7_jax.array_types import Activations, Heads, Lengths
from rwkv7_jax.based.state import ConvMemory, WindowMemory
from rwkv7_jax.based.taylor import cut, join
from rwkv7_jax.model.casts import per_channel, wide_dtype, widened
from rwkv7_jax.model.products import precision

# Minimum number of tokens of a piece of window attention.
_PIECE = 64


def root_mean_square_norm(
    x: Activations, weight: Float[Array, " D"], eps: float
) -> Activations:
    """Scales to a mean square of 1, then by the weight, in float32 or wider."""
    wide = widened(x)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(mean_square + eps)
    return (wide * per_channel(weight, wide)).astype(x.dtype)


def short_convolution(
    x: Activations,
    taps: Float[Array, "K D"],
    bias: Float[Array, " D"],
    memory: ConvMemory,
    lengths: Lengths | None,
) -> tuple[Activations, ConvMemory]:
    """Convolves each channel causally with its own taps; the last tap is the current token's."""
    tokens = x.shape[1]
    past = taps.shape[0] - 1
    # [B K-1+T D]; the token at t is at K-1+t.
    seen = jnp.concatenate([memory.inputs.astype(x.dtype), x], axis=1)
    y = jnp.broadcast_to(per_channel(bias, x), x.shape)
    for i in range(past + 1):
        y = y + per_channel(taps[i], x) * seen[:, i : i + tokens]
    if lengths is None:
        return y, ConvMemory(seen[:, tokens:])
    last = lengths[:, None] + jnp.arange(past, dtype=jnp.int32)[None]
    return y, ConvMemory(jnp.take_along_axis(seen, last[:, :, None], axis=1))


@compiled_when_eager
def window_attention(
    q: Heads,
    k: Heads,
    v: Heads,
    memory: WindowMemory,
    lengths: Lengths | None,
) -> tuple[Heads, WindowMemory]:
    """Attends to the last tokens, as many as the ring has slots, including the current one."""
    batch, tokens = q.shape[:2]
    slots = memory.keys.shape[1]
    # In pieces, so that a long sequence costs T times the window instead of T times T.
    size = max(1, min(tokens, max(slots, _PIECE)))
    if lengths is None:
        lengths = jnp.full(batch, tokens, jnp.int32)

    def step(memory, piece):
        q, k, v, begin = piece
        counted = jnp.clip(lengths - begin, 0, size).astype(jnp.int32)
        y = _attend(q, k, v, memory, counted)
        return _write(k, v, memory, counted), y

    pieces = [cut(x, size) for x in (q, k, v)]
    begins = size * jnp.arange(len(pieces[0]), dtype=jnp.int32)
    memory, y = jax.lax.scan(step, memory, (*pieces, begins))
    return join(y, tokens), memory


def _attend(
    q: Heads, k: Heads, v: Heads, memory: WindowMemory, counted: Int[Array, " B"]
) -> Heads:
    """Attends from each token of a piece to the ring and to the piece."""
    slots = memory.keys.shape[1]
    now = memory.position[:, None]
    steps = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    # The latest position before now in each slot; negative if there is none.
    ring = now - 1 - jnp.mod(now - 1 - slot, slots)
    query_at = now + steps
    key_at = jnp.concatenate([ring, query_at], axis=1)
    is_filled = jnp.concatenate([ring >= 0, steps < counted[:, None]], axis=1)
    age = query_at[:, :, None] - key_at[:, None, :]
    visible = is_filled[:, None, :] & (age >= 0) & (age < slots)

    # Joins only the scores of ring and piece: joining keys and values would copy the ring for every
    # decoded token.
    scores = jnp.concatenate([_scores(q, memory.keys), _scores(q, k)], axis=-1)
    # Not -inf: padding may see no key, and must not become NaN.
    scores = jnp.where(visible[:, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    ring_weights, weights = jnp.split(weights, [slots], axis=-1)
    return _weighted_sum(ring_weights, memory.values) + _weighted_sum(weights, v)


def _scores(q: Heads, k: Float[Array, "B S H N"]) -> Float[Array, "B H T S"]:
    products = jnp.einsum(
        "bthn,bshn->bhts",
        q,
        k,
        precision=precision(q.dtype),
        preferred_element_type=wide_dtype(q.dtype),
    )
    return products / math.sqrt(q.shape[-1])


def _weighted_sum(
    weights: Float[Array, "B H T S"], v: Float[Array, "B S H N"]
) -> Float[Array, "B T H N"]:
    return jnp.einsum("bhts,bshn->bthn", weights, v, precision=precision(v.dtype))


def _write(
    k: Heads, v: Heads, memory: WindowMemory, counted: Int[Array, " B"]
) -> WindowMemory:
    """Writes the piece's last real tokens into the ring, in place if JAX can."""
    slots = memory.keys.shape[1]
    steps = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    counted = counted[:, None]
    # Skips tokens that later ones of the piece overwrite, so no slot is written twice.
    is_kept = (steps < counted) & (steps >= counted - slots)
    # Skipped tokens get a slot out of range, which is dropped.
    slot = jnp.where(is_kept, (memory.position[:, None] + steps) % slots, slots)
    row = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
    return WindowMemory(
        keys=memory.keys.at[row, slot].set(k, mode="drop"),
        values=memory.values.at[row, slot].set(v, mode="drop"),
        position=memory.position + counted[:, 0],
    )
