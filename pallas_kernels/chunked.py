"""WKV-7 chunk by chunk in plain JAX: matrix products in a chunk, a scan over chunks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import chunk_math, tiles
from pallas_kernels.reference import NAMES, Inputs, State

Starts = Float[Array, "C B H Nk Nv"]


def split(x: Float[Array, "B T H N"], chunk: int) -> Float[Array, "C B H L N"]:
    """Chunks first, each head's tokens as rows; zeros fill the last chunk and change nothing."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return x.transpose(1, 0, 3, 2, 4)


def join(x: Float[Array, "C B H L N"], tokens: int) -> Float[Array, "B T H N"]:
    """The inverse of `split`."""
    x = x.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


def _prepare(r, log_w, a, b, inputs: Inputs) -> chunk_math.Chunk:
    """A chunk in float32 or better; products take operands of the tokens' own dtype (v's)."""
    side = log_w.shape[-2] // 2
    halves = tuple(
        jnp.sum(x, axis=-2)[..., None] for x in (log_w[..., :side, :], log_w[..., side:, :])
    )
    return chunk_math.prepare(r, log_w, a, b, halves, chunk_math.Arithmetic(inputs[3].dtype))


def forward_saving(
    inputs: Inputs, state: State, *, chunk: int | None = None
) -> tuple[Float[Array, "B T H Nv"], State, Starts]:
    """What every token reads, the state behind the last, and the state at each chunk's start."""

    def walk(state, tokens):
        r, log_w, k, v, a, b = (x.astype(state.dtype) for x in tokens)
        chunk = _prepare(r, log_w, a, b, inputs)
        y, end = chunk_math.forward(chunk, chunk_math.write(chunk, k, v), state * chunk.mid)
        return end * chunk.rest, (y.astype(inputs[3].dtype), state)

    chunks = tuple(split(x, chunk or tiles.XLA) for x in inputs)
    end, (y, starts) = jax.lax.scan(walk, state.mT, chunks)
    return join(y, inputs[3].shape[1]), end.mT, starts


def forward(
    inputs: Inputs, state: State, *, chunk: int | None = None
) -> tuple[Float[Array, "B T H Nv"], State]:
    """As `forward_saving` without the saved states, which the compiler then drops."""
    y, end, _ = forward_saving(inputs, state, chunk=chunk)
    return y, end


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
        r, log_w, k, v, a, b, dy = (x.astype(start.dtype) for x in (*tokens, dy))
        chunk = _prepare(r, log_w, a, b, inputs)
        states = (start * chunk.mid, dstate * chunk.rest)
        written, read = chunk_math.write(chunk, k, v), chunk_math.read(chunk)
        u = chunk_math.removals(chunk, read.inverse, written, states[0])
        z = chunk_math.removal_gradients(chunk, read.transposed, dy, states[1])
        grads = dict(chunk_math.gradients(chunk, written, u, z, states, dy))
        dstate = chunk_math.state_gradient(chunk, z, dy, states[1]) * chunk.mid
        named = zip(NAMES, inputs, strict=True)
        return dstate, tuple(grads[name].astype(x.dtype) for name, x in named)

    saved = (
        tuple(split(x, chunk or tiles.XLA) for x in inputs),
        split(dy, chunk or tiles.XLA),
        starts,
    )
    dstate, grads = jax.lax.scan(walk, dend.mT.astype(starts.dtype), saved, reverse=True)
    return tuple(join(g, dy.shape[1]) for g in grads), dstate.mT
