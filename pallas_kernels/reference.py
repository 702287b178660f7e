"""The WKV-7 recurrence as its definition reads; every other form is compared with it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Tokens of one call, by name.
NAMES = ("r", "log_w", "k", "v", "a", "b")
Inputs = tuple[
    Float[Array, "B T H Nk"],
    Float[Array, "B T H Nk"],
    Float[Array, "B T H Nk"],
    Float[Array, "B T H Nv"],
    Float[Array, "B T H Nk"],
    Float[Array, "B T H Nk"],
]


class WKVInputs(NamedTuple):
    """The six token arrays of the WKV-7 recurrence, as `wkv7` takes them.

    A plain tuple of the six in this order is accepted wherever the op takes one. The fields have
    no shape annotations that are checked: `tree.map` also builds this class of things that are no
    arrays, such as shardings.

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


State = Float[Array, "B H Nv Nk"]


def step(state: State, token) -> tuple[State, Float[Array, "B H Nv"]]:
    """The state after one token and what is read from it.

    S <- S (diag(w) + a b^T) + v k^T, then y = S r: the removal reads the old state, y the new one.

    Args:
        state: float32 or float64; rows are value channels, columns key channels.
        token: r, log_w, k, v, a, b of one token, each [B H N*], in the state's dtype.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/rwkv_v7_numpy.py:39-40; cuda/rwkv7_clampw.cu:48-63.
    """
    r, log_w, k, v, a, b = token
    removed = jnp.einsum("bhvk,bhk->bhv", state, a, precision="highest")
    state = (
        state * jnp.exp(log_w)[:, :, None, :]
        + removed[..., None] * b[:, :, None, :]
        + v[..., None] * k[:, :, None, :]
    )
    return state, jnp.einsum("bhvk,bhk->bhv", state, r, precision="highest")


def wkv7_reference(inputs: Inputs, state: State) -> tuple[Float[Array, "B T H Nv"], State]:
    """What every token reads and the state behind the last one, one token after the other.

    All arithmetic happens in the state's dtype (float64 where x64 is on); y comes back in v's.
    """
    tokens = tuple(jnp.moveaxis(x, 1, 0).astype(state.dtype) for x in inputs)
    end, y = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(y, 0, 1).astype(inputs[3].dtype), end
