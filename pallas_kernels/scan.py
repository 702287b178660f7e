"""WKV-7 token by token; its backward pass recomputes states instead of storing them all.

A state is kept at the start of every chunk; the backward pass walks each chunk forward once more
from there. Rebuilding states by dividing by the decay, as several kernels do, loses three to five
digits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import tiles
from pallas_kernels.reference import Inputs, State, step, wkv7_reference

Starts = Float[Array, "C B H Nv Nk"]


def forward(
    inputs: Inputs, state: State, *, chunk: int | None = None
) -> tuple[Float[Array, "B T H Nv"], State]:
    """The definition; `chunk` has no part in it."""
    return wkv7_reference(inputs, state)


def split(x: Float[Array, "B T H N"], chunk: int) -> Float[Array, "C L B H N"]:
    """Time first and cut into chunks; zeros fill the last one, and change nothing."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), (0, 0), (0, 0)))
    x = jnp.moveaxis(x, 1, 0)
    return x.reshape(-1, chunk, *x.shape[1:])


def join(x: Float[Array, "C L B H N"], tokens: int) -> Float[Array, "B T H N"]:
    """The inverse of `split`."""
    return jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 0, 1)[:, :tokens]


def forward_saving(
    inputs: Inputs, state: State, *, chunk: int | None = None
) -> tuple[Float[Array, "B T H Nv"], State, Starts]:
    """As `forward`, and the state at the start of every chunk."""

    def walk(state, tokens):
        end, y = jax.lax.scan(step, state, tokens)
        return end, (y, state)

    chunks = tuple(split(x, chunk or tiles.XLA).astype(state.dtype) for x in inputs)
    end, (y, starts) = jax.lax.scan(walk, state, chunks)
    return join(y, inputs[3].shape[1]).astype(inputs[3].dtype), end, starts


def _step_backward(dstate: State, saved) -> tuple[State, tuple[Array, ...]]:
    """The gradient of the state before a token, and the gradients of that token's six inputs.

    Source: BlinkDL/RWKV-CUDA rwkv7_fast_fused (state passing); there rebuilt, here stored states.
    """
    (r, log_w, k, v, a, b), dy, before = saved
    removed = jnp.einsum("bhvk,bhk->bhv", before, a, precision="highest")
    after, _ = step(before, (r, log_w, k, v, a, b))
    dr = jnp.einsum("bhvk,bhv->bhk", after, dy, precision="highest")
    dstate = dstate + dy[..., None] * r[:, :, None, :]
    decay = jnp.exp(log_w)
    dlog_w = jnp.sum(dstate * before, axis=-2) * decay
    dk = jnp.einsum("bhvk,bhv->bhk", dstate, v, precision="highest")
    dv = jnp.einsum("bhvk,bhk->bhv", dstate, k, precision="highest")
    db = jnp.einsum("bhvk,bhv->bhk", dstate, removed, precision="highest")
    dremoved = jnp.einsum("bhvk,bhk->bhv", dstate, b, precision="highest")
    da = jnp.einsum("bhvk,bhv->bhk", before, dremoved, precision="highest")
    dstate = dstate * decay[:, :, None, :] + dremoved[..., None] * a[:, :, None, :]
    return dstate, (dr, dlog_w, dk, dv, da, db)


def backward(
    inputs: Inputs,
    starts: Starts,
    dy: Float[Array, "B T H Nv"],
    dend: State,
    *,
    chunk: int | None = None,
) -> tuple[tuple[Array, ...], State]:
    """Gradients of the six inputs and the start state, from what `forward_saving` kept."""

    def walk(dstate, saved):
        tokens, dy, start = saved
        _, before = jax.lax.scan(lambda s, token: (step(s, token)[0], s), start, tokens)
        return jax.lax.scan(_step_backward, dstate, (tokens, dy, before), reverse=True)

    dtype = starts.dtype
    chunks = tuple(split(x, chunk or tiles.XLA).astype(dtype) for x in inputs)
    saved = (chunks, split(dy, chunk or tiles.XLA).astype(dtype), starts)
    dstate, grads = jax.lax.scan(walk, dend.astype(dtype), saved, reverse=True)
    tokens = dy.shape[1]
    return tuple(
        join(g, tokens).astype(x.dtype) for g, x in zip(grads, inputs, strict=True)
    ), dstate
