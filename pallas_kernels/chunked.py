"""WKV-7 chunk by chunk in plain JAX: matrix products in a chunk, a scan over chunks. Level 0."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import chunk_math
from .reference import Inputs, State
from .scan import Starts


def split(x: Float[Array, "B T H N"], chunk: int) -> Float[Array, "C B H L N"]:
    """Chunks first, each head's tokens as rows; zeros fill the last chunk and change nothing."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return x.transpose(1, 0, 3, 2, 4)


def join(x: Float[Array, "C B H L N"], tokens: int) -> Float[Array, "B T H N"]:
    """The inverse of `split`."""
    x = x.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


def _operands(inputs: Inputs) -> jnp.dtype:
    """Matrix products take operands of the tokens' own dtype (v's); sums are float32 or better."""
    return inputs[3].dtype


def forward_saving(
    inputs: Inputs, state: State, chunk: int
) -> tuple[Float[Array, "B T H Nv"], State, Starts]:
    """What every token reads, the state behind the last, and the state at each chunk's start."""

    def walk(state, tokens):
        r, log_w, k, v, a, b = (x.astype(state.dtype) for x in tokens)
        chunk = chunk_math.prepare(r, log_w, a, b, _operands(inputs))
        y, end = chunk_math.forward(chunk, chunk_math.write(chunk, k, v), state * chunk.mid)
        return end * chunk.rest, (y.astype(inputs[3].dtype), state)

    end, (y, starts) = jax.lax.scan(walk, state, tuple(split(x, chunk) for x in inputs))
    return join(y, inputs[3].shape[1]), end, starts


def forward(inputs: Inputs, state: State, chunk: int) -> tuple[Float[Array, "B T H Nv"], State]:
    """As `forward_saving` without the saved states, which the compiler then drops."""
    y, end, _ = forward_saving(inputs, state, chunk)
    return y, end


def backward(
    inputs: Inputs, starts: Starts, dy: Float[Array, "B T H Nv"], dend: State, *, chunk: int
) -> tuple[tuple[Array, ...], State]:
    """Gradients of the six inputs and the start state, from what `forward_saving` kept."""

    def walk(dstate, saved):
        tokens, dy, start = saved
        r, log_w, k, v, a, b, dy = (x.astype(start.dtype) for x in (*tokens, dy))
        chunk = chunk_math.prepare(r, log_w, a, b, _operands(inputs))
        states = (start * chunk.mid, dstate * chunk.rest)
        z = chunk_math.removal_gradients(chunk, dy, states[1])
        grads = chunk_math.gradients(chunk, chunk_math.write(chunk, k, v), states, z, dy)
        dstate = chunk_math.state_gradient(chunk, z, dy, states[1]) * chunk.mid
        return dstate, tuple(g.astype(x.dtype) for g, x in zip(grads, inputs, strict=True))

    saved = (tuple(split(x, chunk) for x in inputs), split(dy, chunk), starts)
    dstate, grads = jax.lax.scan(walk, dend.astype(starts.dtype), saved, reverse=True)
    return tuple(join(g, dy.shape[1]) for g in grads), dstate
