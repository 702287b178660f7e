"""The tokens of one row sharded over n devices: each has a shard of T/n tokens, in order.

Every function here runs on each device of a mesh axis. A row's start state belongs to the first
shard; each other shard starts from the end state of the one before.

Over a shard the state changes as S' = S M + N, where M and N depend only on the shard's tokens. All
devices therefore run the WKV op in parallel, and exchange M and N instead of tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels import WKVInputs
from rwkv7_jax.array_types import Activations, Heads, Lengths, Tokens

# The name of data from another device, for `jax.checkpoint` policies.
RECEIVED = "received from another device"

WKVState = Float[Array, "B H Nv Nk"]

# The WKV op with its options: maps inputs and start state to y and the state after the last token.
Op = Callable[[WKVInputs, WKVState], tuple[Heads, WKVState]]


def wkv7_along_time(
    op: Op, inputs: WKVInputs, state: WKVState, axis: str, **options: Any
) -> tuple[Heads, WKVState]:
    """Runs the WKV op on rows whose tokens are sharded along a mesh axis.

    The op runs once, with Nk additional rows of values. These are 0 and start from the identity:
    their reads tell how any start state contributes to y, and their end state is M.

    Args:
        op: the op.
        inputs: the device's tokens, [B T/n H N].
        state: the row's start state, replicated.
        axis: the mesh axis; its size need not be a power of 2.
        options: further options of the op.

    Returns:
        y of the device's tokens, and on every device the state after the row's last token.
    """
    count = jax.lax.axis_size(axis)
    *before_values, values = state.shape
    rows = inputs.v.shape[-1]
    own_start = jnp.where(jax.lax.axis_index(axis) == 0, state, 0)
    identity = jnp.broadcast_to(
        jnp.eye(values, dtype=state.dtype), (*before_values[:-1], values, values)
    )
    no_values = jnp.zeros((*inputs.v.shape[:-1], values), inputs.v.dtype)
    both, ends = op(
        inputs._replace(v=jnp.concatenate([inputs.v, no_values], axis=-1)),
        jnp.concatenate([own_start, identity], axis=-2),
        **options,
    )

    # N [B H Nv Nk] and M [B H Nk Nk]. The first shard's N includes the start state.
    added = ends[..., :rows, :]
    kept = ends[..., rows:, :]
    # After a round of distance d, `added` and `kept` cover the 2d shards that end here. A device
    # without a sender gets zeros, so its M adds nothing: its range includes the first shard.
    distance = 1
    while distance < count:
        added = _product(_from_before(added, axis, distance), kept) + added
        # The last round's M is not needed.
        if 2 * distance < count:
            kept = _product(_from_before(kept, axis, distance), kept)
        distance *= 2

    start = _from_before(added, axis, 1)
    carried = jnp.einsum(
        "bhvk,bthk->bthv",
        start,
        both[..., rows:].astype(start.dtype),
        precision="highest",
    )
    y = both[..., :rows].astype(start.dtype) + carried
    return y.astype(both.dtype), from_last(added, axis)


def previous_token(
    x: Activations, before: Float[Array, "B D"], axis: str
) -> Float[Array, "B D"]:
    """Returns the token before a device's first one; on the first device it is `before`."""
    is_first = jax.lax.axis_index(axis) == 0
    return jnp.where(is_first, before.astype(x.dtype), _from_before(x[:, -1], axis, 1))


def fill_up(
    tokens: Tokens | Activations, lengths: Lengths | None, count: int
) -> tuple[Array, Lengths | None]:
    """Pads rows so that `count` devices divide their tokens; `lengths` exclude the padding."""
    length = tokens.shape[1]
    # Every device needs a token, even if the rows are empty.
    missing = max(-length % count, count - length)
    if not missing:
        return jnp.asarray(tokens), lengths
    if lengths is None:
        lengths = jnp.full(tokens.shape[0], length, jnp.int32)
    padding = [(0, 0), (0, missing), *[(0, 0)] * (tokens.ndim - 2)]
    return jnp.pad(tokens, padding), lengths


def local_lengths(lengths: Lengths, tokens: int, axis: str) -> Lengths:
    """Returns the number of a device's `tokens` that are real, from the lengths of whole rows."""
    first = jax.lax.axis_index(axis) * tokens
    return jnp.clip(lengths - first, 0, tokens)


def from_last(x: Float[Array, "..."], axis: str) -> Float[Array, "..."]:
    """Broadcasts the last device's array to all devices."""
    is_last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
    return jax.lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), axis)


def from_last_token(
    x: Float[Array, "B D"], lengths: Lengths | None, tokens: int, axis: str
) -> Float[Array, "B D"]:
    """Broadcasts each row's array from the device with the row's last token to all devices.

    Args:
        x: the device's array for each row.
        lengths: the number of the device's real tokens; None for all.
        tokens: the tokens of the device.
        axis: the mesh axis.
    """
    if lengths is None:
        return from_last(x, axis)
    in_all = jnp.asarray(jax.lax.psum(lengths, axis))
    # An empty row belongs to the first device.
    owner = jnp.maximum(in_all - 1, 0) // tokens
    is_owner = owner == jax.lax.axis_index(axis)
    return jax.lax.psum(jnp.where(is_owner[:, None], x, jnp.zeros_like(x)), axis)


def _from_before(x: Array, axis: str, distance: int) -> Array:
    """Receives x from the device `distance` places before; zeros if there is none."""
    count = jax.lax.axis_size(axis)
    # A full ring: `jax.vmap` supports no partial permutation.
    ring = [(i, (i + distance) % count) for i in range(count)]
    received = checkpoint_name(jax.lax.ppermute(x, axis, ring), RECEIVED)
    has_sender = jax.lax.axis_index(axis) >= distance
    return jnp.where(has_sender, received, jnp.zeros_like(received))


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision="highest")
