"""The tokens of one row on several devices: each has a piece of T/n tokens, in order.

Every function here is called on each device, with a mesh axis of n devices along which the pieces
lie. A row's start state belongs to the first piece; the others start from what the pieces before
them left.

Over a piece the state changes as S' = S M + N: M and N depend on the piece's tokens alone. So all
devices run the WKV op at the same time, and what is exchanged is M and N, not tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels import WKVInputs
from rwkv7_jax.array_types import Activations, Heads, Lengths, Tokens

# The name of what comes from another device, for policies of `jax.checkpoint`.
RECEIVED = "received from another device"

WKVState = Float[Array, "B H Nv Nk"]

# The WKV op with its options: inputs and start state to y and the state after the last token.
Op = Callable[[WKVInputs, WKVState], tuple[Heads, WKVState]]


def wkv7_along_time(
    op: Op, inputs: WKVInputs, state: WKVState, axis: str, **options: Any
) -> tuple[Heads, WKVState]:
    """Runs the WKV op on rows whose tokens lie along a mesh axis.

    The op runs once, with Nk more rows of values: they are 0 and start from the identity, so that
    what they read is what any start state adds to y, and what they end as is M.

    Args:
        op: the op.
        inputs: the device's tokens, [B T/n H N].
        state: the row's start state, the same on all devices.
        axis: the mesh axis; its size need be no power of 2.
        options: of the op, besides those that it has.

    Returns:
        y of the device's tokens, and on every device the state after the row's last token.
    """
    count = jax.lax.axis_size(axis)
    *before_values, values = state.shape
    rows = inputs.v.shape[-1]
    is_first = jax.lax.axis_index(axis) == 0
    own_start = jnp.where(is_first, state, 0)
    identity = jnp.broadcast_to(
        jnp.eye(values, dtype=state.dtype), (*before_values[:-1], values, values)
    )
    no_values = jnp.zeros((*inputs.v.shape[:-1], values), inputs.v.dtype)
    both, ends = op(
        inputs._replace(v=jnp.concatenate([inputs.v, no_values], axis=-1)),
        jnp.concatenate([own_start, identity], axis=-2),
        **options,
    )

    # [B H Nv Nk] and [B H Nk Nk]. The first piece has its start state already: nothing that comes
    # before it can change its end, which is M = 0.
    added = ends[..., :rows, :]
    kept = jnp.where(is_first, 0, ends[..., rows:, :])
    # After a round of distance d, `added` and `kept` cover the 2d pieces that end here. Devices
    # that receive nothing get zeros: their range reaches the first piece already.
    distance = 1
    while distance < count:
        added = _product(_from_before(added, axis, distance), kept) + added
        # The last round's M would be read by nothing.
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
    """Fills rows up so that `count` devices divide their tokens; the added ones do not count."""
    length = tokens.shape[1]
    # Each device has a token, also of rows of none.
    missing = max(-length % count, count - length)
    if not missing:
        return jnp.asarray(tokens), lengths
    if lengths is None:
        lengths = jnp.full(tokens.shape[0], length, jnp.int32)
    padding = [(0, 0), (0, missing), *[(0, 0)] * (tokens.ndim - 2)]
    return jnp.pad(tokens, padding), lengths


def local_lengths(lengths: Lengths, tokens: int, axis: str) -> Lengths:
    """Returns how many of a device's `tokens` count, of rows of which `lengths` count in all."""
    first = jax.lax.axis_index(axis) * tokens
    return jnp.clip(lengths - first, 0, tokens)


def from_last(x: Float[Array, "..."], axis: str) -> Float[Array, "..."]:
    """Gives all devices the last one's array."""
    is_last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
    return jax.lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), axis)


def from_last_token(
    x: Float[Array, "B D"], lengths: Lengths | None, tokens: int, axis: str
) -> Float[Array, "B D"]:
    """Gives all devices each row's array from the device that has the row's last token.

    Args:
        x: what the device has for each row.
        lengths: the tokens of the device that count; None for all.
        tokens: the tokens of the device.
        axis: the mesh axis.
    """
    if lengths is None:
        return from_last(x, axis)
    in_all = jnp.asarray(jax.lax.psum(lengths, axis))
    # A row of no tokens ends on the first device, with what it started from.
    owner = jnp.maximum(in_all - 1, 0) // tokens
    is_owner = owner == jax.lax.axis_index(axis)
    return jax.lax.psum(jnp.where(is_owner[:, None], x, jnp.zeros_like(x)), axis)


def _from_before(x: Array, axis: str, distance: int) -> Array:
    """Receives what the device `distance` places before has; zeros where there is none."""
    count = jax.lax.axis_size(axis)
    # A full ring, also where nothing is wanted: `jax.vmap` knows no other permutation.
    ring = [(i, (i + distance) % count) for i in range(count)]
    received = checkpoint_name(jax.lax.ppermute(x, axis, ring), RECEIVED)
    has_sender = jax.lax.axis_index(axis) >= distance
    return jnp.where(has_sender, received, jnp.zeros_like(received))


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision="highest")
