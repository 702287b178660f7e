"""WKV-7 token by token; its backward pass recomputes states instead of saving all of them.

The forward pass of a gradient saves the state at the start of every chunk, and the backward pass
runs each chunk forward again from there. Recovering earlier states by dividing by the decay, as
several published kernels do, loses three to five digits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import packed_rows, platforms, tiles
from pallas_kernels.packed_rows import Owners
from pallas_kernels.reference import State, WKVInputs, read, step, update

Starts = Float[Array, "C B H Nv Nk"]


def forward(
    inputs: WKVInputs,
    state: State,
    owners: Owners | None = None,
    *,
    chunk: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H Nv"], State]:
    """Runs the definition; `interpret` has no effect, nor has `chunk` without `owners`.

    Tokens are indexed in place. Moving time to the front, as `wkv7_reference` does, copies all
    inputs, which costs as much as the recurrence where they do not fit into the cache.
    """
    if owners is not None:
        y, end, _ = forward_saving(inputs, state, owners, chunk=chunk)
        return y, end
    if inputs.r.shape[1] == 1:
        return _forward_one(inputs, state)

    def read_token(state, place):
        token = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, place, 1, keepdims=False), inputs
        )
        return step(state, jax.tree.map(lambda x: x.astype(state.dtype), token))

    v = inputs.v
    end, y = jax.lax.scan(read_token, state, jnp.arange(v.shape[1]))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), end


def _forward_one(
    inputs: WKVInputs, state: State
) -> tuple[Float[Array, "B 1 H Nv"], State]:
    """Runs a single token, as decoding does."""
    token = jax.tree.map(lambda x: x[:, 0].astype(state.dtype), inputs)
    removed = read(state, token.a)
    if platforms.target_platform() != "cpu":
        # If XLA fused this sum over the old state with the update, it could not update the state in
        # place and would copy it.
        removed = jax.lax.optimization_barrier(removed)
    end, y = update(state, token, removed)
    return y[:, None].astype(inputs.v.dtype), end


def split(x: Float[Array, "B T H N"], chunk: int) -> Float[Array, "C L B H N"]:
    """Moves time to the front and splits it into chunks, the last one padded with zeros."""
    # A token of zeros changes neither the state nor a gradient.
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), (0, 0), (0, 0)))
    x = jnp.moveaxis(x, 1, 0)
    return x.reshape(-1, chunk, *x.shape[1:])


def join(x: Float[Array, "C L B H N"], tokens: int) -> Float[Array, "B T H N"]:
    """Inverts `split`."""
    return jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 0, 1)[:, :tokens]


def _split_inputs(inputs: WKVInputs, chunk: int, dtype) -> WKVInputs:
    return jax.tree.map(lambda x: split(x, chunk).astype(dtype), inputs)


def forward_saving(
    inputs: WKVInputs,
    state: State,
    owners: Owners | None = None,
    *,
    chunk: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H Nv"], State, Starts]:
    """Computes what `forward` does, and the state at the start of every chunk."""

    def walk(states, chunk):
        tokens, owner = chunk
        state = packed_rows.read(states, owner)
        # A nested scan: only the outer one's states are saved.
        end, y = jax.lax.scan(step, state, tokens)
        return packed_rows.write(states, owner, end), (y, state)

    chunks = _split_inputs(inputs, chunk or tiles.XLA, state.dtype)
    by_chunk = None if owners is None else owners.T
    end, (y, starts) = jax.lax.scan(walk, state, (chunks, by_chunk))
    v = inputs.v
    return join(y, v.shape[1]).astype(v.dtype), end, starts


def _step_backward(dstate: State, saved) -> tuple[State, WKVInputs]:
    """Computes the gradients of the state before a token and of the token's six inputs.

    Source: BlinkDL/RWKV-CUDA rwkv7_fast_fused (state passing), which recovers the states that are
    recomputed here.
    """
    token, dy, before = saved
    r, log_w, k, v, a, b = token
    removed = read(before, a)
    after, _ = update(before, token, removed)
    dr = jnp.einsum("bhvk,bhv->bhk", after, dy, precision="highest")
    # Now the gradient of the state after the token, which y = S r reads as well.
    dstate = dstate + dy[..., None] * r[:, :, None, :]
    decay = jnp.exp(log_w)
    dlog_w = jnp.sum(dstate * before, axis=-2) * decay
    dk = jnp.einsum("bhvk,bhv->bhk", dstate, v, precision="highest")
    dv = jnp.einsum("bhvk,bhk->bhv", dstate, k, precision="highest")
    db = jnp.einsum("bhvk,bhv->bhk", dstate, removed, precision="highest")
    dremoved = jnp.einsum("bhvk,bhk->bhv", dstate, b, precision="highest")
    da = jnp.einsum("bhvk,bhv->bhk", before, dremoved, precision="highest")
    dstate = dstate * decay[:, :, None, :] + dremoved[..., None] * a[:, :, None, :]
    return dstate, WKVInputs(
        r=dr,
        log_w=dlog_w,
        k=dk,
        v=dv,
        a=da,
        b=db,
    )


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

    def walk(dstates, saved):
        tokens, dy, start, owner = saved
        # The states before each token of this chunk: C states at a time instead of T.
        _, before = jax.lax.scan(lambda s, token: (step(s, token)[0], s), start, tokens)
        dstate, grads = jax.lax.scan(
            _step_backward,
            packed_rows.read(dstates, owner),
            (tokens, dy, before),
            reverse=True,
        )
        return packed_rows.write(dstates, owner, dstate), grads

    length = chunk or tiles.XLA
    # All arithmetic is in the state's dtype, as in the definition.
    dtype = starts.dtype
    chunks = _split_inputs(inputs, length, dtype)
    by_chunk = None if owners is None else owners.T
    saved = (chunks, split(dy, length).astype(dtype), starts, by_chunk)
    dstate, grads = jax.lax.scan(walk, dend.astype(dtype), saved, reverse=True)
    tokens = dy.shape[1]
    grads = jax.tree.map(lambda g, x: join(g, tokens).astype(x.dtype), grads, inputs)
    return grads, dstate
