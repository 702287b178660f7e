"""WKV-7 chunk by chunk in plain JAX: matrix products inside a chunk, a scan over the chunks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import chunk_math, packed_rows, tiles
from pallas_kernels.packed_rows import Owners
from pallas_kernels.reference import State, WKVInputs

Starts = Float[Array, "C B H Nk Nv"]


def split(x: Float[Array, "B T H N"], chunk: int) -> Float[Array, "C B H L N"]:
    """Moves chunks to the front and makes each head's tokens rows; pads the last chunk with 0."""
    # A token of zeros changes neither the state nor a gradient.
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return x.transpose(1, 0, 3, 2, 4)


def join(x: Float[Array, "C B H L N"], tokens: int) -> Float[Array, "B T H N"]:
    """Inverts `split`."""
    x = x.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


def _prepare(tokens: WKVInputs, dtype: jnp.dtype) -> chunk_math.Chunk:
    """Prepares a chunk in float32 or better; its products take operands of `dtype`."""
    log_w = tokens.log_w
    middle = log_w.shape[-2] // 2
    # [B H Nk 1]: a column, which scales the rows of a state, its keys.
    first_half = jnp.sum(log_w[..., :middle, :], axis=-2)[..., None]
    second_half = jnp.sum(log_w[..., middle:, :], axis=-2)[..., None]
    return chunk_math.prepare(
        tokens.r,
        log_w,
        tokens.a,
        tokens.b,
        (first_half, second_half),
        chunk_math.Arithmetic(dtype),
    )


def forward_saving(
    inputs: WKVInputs,
    state: State,
    owners: Owners | None = None,
    *,
    chunk: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H Nv"], State, Starts]:
    """Computes y, the state after the last token, and the state at the start of every chunk."""
    dtype = inputs.v.dtype

    def walk(states, chunk):
        tokens, owner = chunk
        state = packed_rows.read(states, owner)
        tokens = jax.tree.map(lambda x: x.astype(state.dtype), tokens)
        prepared = _prepare(tokens, dtype)
        written = chunk_math.write_products(prepared, tokens.k, tokens.v)
        y, end = chunk_math.forward(prepared, written, state * prepared.mid)
        # Saved unscaled, unlike in the GPU kernels: the backward pass scales it itself.
        end = end * prepared.rest
        return packed_rows.write(states, owner, end), (y.astype(dtype), state)

    chunks = jax.tree.map(lambda x: split(x, chunk or tiles.XLA), inputs)
    # `chunk_math` has keys as the rows of a state, the op has values.
    by_chunk = None if owners is None else owners.T
    end, (y, starts) = jax.lax.scan(walk, state.mT, (chunks, by_chunk))
    return join(y, inputs.v.shape[1]), end.mT, starts


def forward(
    inputs: WKVInputs,
    state: State,
    owners: Owners | None = None,
    *,
    chunk: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H Nv"], State]:
    """Runs `forward_saving` without the saved states, which the compiler then drops."""
    y, end, _ = forward_saving(inputs, state, owners, chunk=chunk)
    return y, end


def backward(
    inputs: WKVInputs,
    starts: Starts,
    dy: Float[Array, "B T H Nv"],
    dend: State,
    owners: Owners | None = None,
    *,
    chunk: int | None = None,
    interpret: bool = False,
) -> tuple[WKVInputs, State]:
    """Computes the gradients of the six inputs and of the start state."""
    dtype = inputs.v.dtype

    def walk(dstates, saved):
        *arrays, owner = saved
        tokens, dy, start = jax.tree.map(lambda x: x.astype(starts.dtype), arrays)
        dstate = packed_rows.read(dstates, owner)
        prepared = _prepare(tokens, dtype)
        states = (start * prepared.mid, dstate * prepared.rest)
        written = chunk_math.write_products(prepared, tokens.k, tokens.v)
        read = chunk_math.read_products(prepared)
        u = chunk_math.removals(prepared, read.inverse, written, states[0])
        z = chunk_math.removal_gradients(prepared, read.transposed, dy, states[1])
        # The generator's order suits a kernel's registers and does not matter here.
        by_name = dict(chunk_math.gradients(prepared, written, u, z, states, dy))
        grads = WKVInputs(**by_name)
        dstate = chunk_math.state_gradient(prepared, z, dy, states[1]) * prepared.mid
        grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, inputs)
        return packed_rows.write(dstates, owner, dstate), grads

    length = chunk or tiles.XLA
    saved = (
        jax.tree.map(lambda x: split(x, length), inputs),
        split(dy, length),
        starts,
        None if owners is None else owners.T,
    )
    dstate, grads = jax.lax.scan(
        walk, dend.mT.astype(starts.dtype), saved, reverse=True
    )
    return jax.tree.map(lambda g: join(g, dy.shape[1]), grads), dstate.mT
