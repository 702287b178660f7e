"""Token shift: mixes every token with the one before it; a state keeps the last one."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import platforms
from rwkv7_jax.array_types import Activations, Lengths
from rwkv7_jax.model import segments as segments_of_rows
from rwkv7_jax.model import time_shards
from rwkv7_jax.model.casts import per_channel
from rwkv7_jax.model.products import is_one_token_on_gpu, share_buffer_of_one_token
from rwkv7_jax.model.segments import Segments
from rwkv7_jax.sharding import time_axis


def mix_with_previous(
    x: Activations,
    before: Float[Array, "S D"],
    coefficients: tuple[Float[Array, " D"], ...],
    segments: Segments | None = None,
) -> tuple[Activations, ...]:
    """Interpolates between every token and the one before it with each vector of coefficients."""
    axis = time_axis()
    if axis is not None:
        before = time_shards.previous_token(x, before, axis)
    previous = previous_tokens(x, before, segments)
    mixed = [_lerp(x, previous, vector) for vector in coefficients]
    return share_buffer_of_one_token(mixed)


def previous_tokens(
    x: Activations,
    before: Float[Array, "S D"],
    segments: Segments | None = None,
) -> Activations:
    """Shifts by one token; the first one's predecessor is `before`."""
    if segments is not None:
        return segments_of_rows.shift(x, before, segments)
    # [B T+1 D]: its first T tokens are the predecessors.
    both = jnp.concatenate([before[:, None].astype(x.dtype), x], axis=1)
    return both[:, : x.shape[1]]


def last_token(
    x: Activations,
    before: Float[Array, "S D"],
    lengths: Lengths | None,
    segments: Segments | None = None,
) -> Float[Array, "S D"]:
    """Takes the last real token of every sequence, or `before` if it has none."""
    if segments is not None:
        return segments_of_rows.last_tokens(x, before, segments)
    axis = time_axis()
    if axis is None and lengths is not None and _takes_select(x):
        return jnp.where(lengths[:, None] > 0, x[:, 0], before.astype(x.dtype))
    # With `before` in front, position n holds the last of n tokens, including n = 0.
    both = jnp.concatenate([before[:, None].astype(x.dtype), x], axis=1)
    if lengths is None:
        last = both[:, -1]
    else:
        last = jnp.take_along_axis(both, lengths[:, None, None], axis=1)[:, 0]
    if axis is None:
        return last
    return time_shards.from_last_token(last, lengths, x.shape[1], axis)


def _takes_select(x: Activations) -> bool:
    """Tells whether a pointwise select is the best way to the last token.

    Of a single token it lets XLA update the state in place. For several rows on a GPU, XLA makes
    more kernels of it than of a gather.
    """
    if is_one_token_on_gpu(x):
        return True
    return x.shape[1] == 1 and platforms.target_platform() == "tpu"


def _lerp(
    x: Activations,
    shifted: Activations,
    coefficient: Float[Array, " D"],
) -> Activations:
    """Interpolates: x where the coefficient is 0, the previous token where it is 1."""
    coefficient = per_channel(coefficient, x)
    return x + (shifted - x) * coefficient
