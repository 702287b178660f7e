"""The WKV-7 recurrence by its definition, with which all implementations are compared."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# S is B, or a multiple of it where several sequences share a row.
State = Float[Array, "S H Nv Nk"]


class WKVInputs(NamedTuple):
    """The six token arrays of the WKV-7 recurrence, in the order in which `wkv7` takes them.

    The fields have no checked shapes: `jax.tree.map` also builds this class from leaves that are
    not arrays, such as shardings.

    Attributes:
        r: receptance, [B T H Nk].
        log_w: natural logarithm of the decay, [B T H Nk].
        k: key, [B T H Nk].
        v: value, [B T H Nv].
        a: removal key, [B T H Nk].
        b: removal key times in-context learning rate, [B T H Nk].
    """

    r: Array
    log_w: Array
    k: Array
    v: Array
    a: Array
    b: Array


NAMES = WKVInputs._fields


def step(state: State, token: WKVInputs) -> tuple[State, Float[Array, "B H Nv"]]:
    """Computes the state after one token and reads from it.

    S <- S (diag(w) + a b^T) + v k^T, then y = S r: the removal reads the old state, y the new one.

    Args:
        state: float32 or float64; rows are value channels, columns key channels.
        token: the six inputs of one token, each [B H N*], in the state's dtype.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/rwkv_v7_numpy.py:39-40; cuda/rwkv7_clampw.cu:48-63.
    """
    return update(state, token, read(state, token.a))


def read(state: State, key: Float[Array, "B H Nk"]) -> Float[Array, "B H Nv"]:
    """Reads the value that a state holds under a key, S key."""
    return jnp.einsum("bhvk,bhk->bhv", state, key, precision="highest")


def update(
    state: State, token: WKVInputs, removed: Float[Array, "B H Nv"]
) -> tuple[State, Float[Array, "B H Nv"]]:
    """Works as `step`, given the value that the old state holds under the removal key."""
    r, log_w, k, v, _, b = token
    state = (
        state * jnp.exp(log_w)[:, :, None, :]
        + removed[..., None] * b[:, :, None, :]
        + v[..., None] * k[:, :, None, :]
    )
    return state, read(state, r)


def wkv7_reference(
    inputs: WKVInputs | tuple[Array, ...], state: State
) -> tuple[Float[Array, "B T H Nv"], State]:
    """Runs the recurrence token by token.

    All arithmetic is in the state's dtype (float64 under x64).

    Args:
        inputs: r, log_w, k, v, a, b.
        state: the start state.

    Returns:
        y in v's dtype, and the state after the last token.
    """
    inputs = WKVInputs(*inputs)
    # [T B H N]: the scan runs over the first axis.
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0).astype(state.dtype), inputs)
    end, y = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(y, 0, 1).astype(inputs.v.dtype), end
