"""WKV-7 token by token on a GPU, as in most published CUDA kernels: the baseline for ours.

One program processes one head of one sequence with its state in registers. The forward pass of a
gradient stores the state after every 16th token and what each token removes. The backward pass
starts from those states and rebuilds the earlier ones by dividing by the decay, which loses digits
if the decay is strong. Pallas kernels, lowered through Triton.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton
from jaxtyping import Array, Float

from pallas_kernels.reference import State, WKVInputs

# Tokens between two kept states.
KEPT_EVERY = 16

Removed = Float[Array, "B T H Nv"]
Kept = Float[Array, "B H C Nv Nk"]


def _read(refs, t) -> tuple[Array, ...]:
    """Reads token `t` of each array, in float32."""
    return tuple(ref[0, t, 0, :].astype(jnp.float32) for ref in refs)


def _forward_kernel(
    r,
    log_w,
    k,
    v,
    a,
    b,
    start,
    y,
    end,
    *saved,
):
    """Walks all tokens of one head for some value rows; `saved` gets removals and kept states.

    The start state comes with keys as rows: a thread then holds many keys of few values, and a sum
    over keys needs few exchanges between threads.
    """
    arrays = (r, log_w, k, v, a, b)
    tokens = r.shape[1]

    def token(t, carry):
        state, (r, log_w, k, v, a, b) = carry
        # The next token is loaded while this one is processed.
        following = _read(arrays, jnp.minimum(t + 1, tokens - 1))
        removed = jnp.sum(state * a[None, :], axis=1)
        state = state * jnp.exp(log_w)[None, :]
        state += removed[:, None] * b[None, :] + v[:, None] * k[None, :]
        y[0, t, 0, :] = jnp.sum(state * r[None, :], axis=1).astype(y.dtype)
        if saved:
            saved[0][0, t, 0, :] = removed
        return state, following

    def chunk(c, carry):
        first = c * KEPT_EVERY
        carry = jax.lax.fori_loop(first, first + KEPT_EVERY, token, carry)
        if saved:
            saved[1][0, 0, c] = carry[0]
        return carry

    carry = (start[0, 0].T, _read(arrays, 0))
    end[0, 0] = jax.lax.fori_loop(0, tokens // KEPT_EVERY, chunk, carry)[0]


def _token_backward(token, after: Float[Array, "Nv Nk"], dstate: Float[Array, "Nv Nk"]):
    """Computes the state before a token, its gradient, and six gradients, from those after it."""
    r, log_w, k, v, a, b, dy, removed = token
    decay = jnp.exp(log_w)
    dr = jnp.sum(after * dy[:, None], axis=0)
    dstate += dy[:, None] * r[None, :]
    before = after - v[:, None] * k[None, :] - removed[:, None] * b[None, :]
    before *= (1 / decay)[None, :]
    dlog_w = jnp.sum(dstate * before, axis=0) * decay
    dk = jnp.sum(dstate * v[:, None], axis=0)
    dv = jnp.sum(dstate * k[None, :], axis=1)
    db = jnp.sum(dstate * removed[:, None], axis=0)
    dremoved = jnp.sum(dstate * b[None, :], axis=1)
    da = jnp.sum(before * dremoved[:, None], axis=0)
    dstate = dstate * decay[None, :] + dremoved[:, None] * a[None, :]
    return before, dstate, (dr, dlog_w, dk, dv, da, db)


def _backward_kernel(
    r,
    log_w,
    k,
    v,
    a,
    b,
    dy,
    removed,
    kept,
    dend,
    *gradients,
):
    """Walks all tokens of one head from the last to the first."""
    arrays = (r, log_w, k, v, a, b, dy, removed)
    *gradients, dstart = gradients
    chunks = kept.shape[2]

    def chunk(i, carry):
        c = chunks - 1 - i

        def token(j, carry):
            after, dstate, current = carry
            t = (c + 1) * KEPT_EVERY - 1 - j
            following = _read(arrays, jnp.maximum(t - 1, 0))
            before, dstate, found = _token_backward(current, after, dstate)
            for ref, value in zip(gradients, found, strict=True):
                ref[0, t, 0, :] = value.astype(ref.dtype)
            return before, dstate, following

        return jax.lax.fori_loop(0, KEPT_EVERY, token, (kept[0, 0, c], *carry))[1:]

    carry = (dend[0, 0], _read(arrays, chunks * KEPT_EVERY - 1))
    dstart[0, 0] = jax.lax.fori_loop(0, chunks, chunk, carry)[0]


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _forward(
    inputs: WKVInputs,
    state: State,
    *,
    save: bool,
    rows: int,
    interpret: bool,
):
    """Computes y and the last state; with `save` also the removals and every 16th state."""
    v = inputs[3]
    batch, tokens, heads, values = v.shape
    keys = state.shape[3]
    chunks = tokens // KEPT_EVERY
    rows = math.gcd(rows, values)
    by_key = pl.BlockSpec((1, tokens, 1, keys), lambda i, j, n: (i, 0, j, 0))
    by_value = pl.BlockSpec((1, tokens, 1, rows), lambda i, j, n: (i, 0, j, n))
    out_specs = [
        by_value,
        pl.BlockSpec((1, 1, rows, keys), lambda i, j, n: (i, j, n, 0)),
    ]
    out_shape = [_like(v), _like(state)]
    if save:
        kept = pl.BlockSpec((1, 1, chunks, rows, keys), lambda i, j, n: (i, j, 0, n, 0))
        kept_shape = (batch, heads, chunks, values, keys)
        out_specs += [by_value, kept]
        out_shape += [
            jax.ShapeDtypeStruct(x, jnp.float32) for x in (v.shape, kept_shape)
        ]
    start = pl.BlockSpec((1, 1, keys, rows), lambda i, j, n: (i, j, 0, n))
    return pl.pallas_call(
        _forward_kernel,
        grid=(batch, heads, values // rows),
        in_specs=[by_key, by_key, by_key, by_value, by_key, by_key, start],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=pallas_triton.CompilerParams(num_warps=1),
        interpret=interpret,
    )(*inputs, state.mT)


def _backward(
    inputs: WKVInputs,
    removed: Removed,
    kept: Kept,
    dy: Float[Array, "B T H Nv"],
    dend: State,
    *,
    warps: int,
    interpret: bool,
):
    """Computes the gradients of the six inputs and of the start state."""
    batch, tokens, heads, keys = inputs[0].shape
    chunks, values = kept.shape[2:4]
    by_key = pl.BlockSpec((1, tokens, 1, keys), lambda i, j: (i, 0, j, 0))
    by_value = pl.BlockSpec((1, tokens, 1, values), lambda i, j: (i, 0, j, 0))
    states = pl.BlockSpec((1, 1, values, keys), lambda i, j: (i, j, 0, 0))
    all_kept = pl.BlockSpec((1, 1, chunks, values, keys), lambda i, j: (i, j, 0, 0, 0))
    six = [by_key, by_key, by_key, by_value, by_key, by_key]
    return pl.pallas_call(
        _backward_kernel,
        grid=(batch, heads),
        in_specs=[*six, by_value, by_value, all_kept, states],
        out_specs=[*six, states],
        out_shape=[_like(x) for x in (*inputs, dend)],
        compiler_params=pallas_triton.CompilerParams(num_warps=warps),
        interpret=interpret,
    )(*inputs, dy, removed, kept, dend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _op(
    rows: int,
    warps: int,
    interpret: bool,
    inputs: WKVInputs,
    state: State,
):
    return tuple(
        _forward(
            inputs,
            state,
            save=False,
            rows=rows,
            interpret=interpret,
        )
    )


def _op_forward(
    rows: int,
    warps: int,
    interpret: bool,
    inputs: WKVInputs,
    state: State,
):
    y, end, *saved = _forward(
        inputs,
        state,
        save=True,
        rows=rows,
        interpret=interpret,
    )
    return (y, end), (inputs, *saved)


def _op_backward(
    rows: int,
    warps: int,
    interpret: bool,
    residuals,
    cotangents,
):
    *six, dstate = _backward(
        *residuals,
        *cotangents,
        warps=warps,
        interpret=interpret,
    )
    return WKVInputs(*six), dstate


_op.defvjp(_op_forward, _op_backward)


def sequential(
    inputs: WKVInputs,
    state: State,
    *,
    rows: int = 16,
    warps: int = 4,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H Nv"], State]:
    """Computes what every token reads and the last state; all seven inputs have gradients.

    Args:
        inputs: r, log_w, k, v, a, b in float32 or bfloat16, with Nk and Nv powers of two.
        state: float32.
        rows: value rows of a forward program (of one warp); they are independent.
        warps: of 32 threads a backward program, which has all value rows.
        interpret: runs without a GPU, slowly.

    Raises:
        ValueError: T is no multiple of `KEPT_EVERY`.
    """
    tokens = inputs[0].shape[1]
    if tokens % KEPT_EVERY:
        raise ValueError(
            f"sequential: T must be a multiple of {KEPT_EVERY}; got {tokens}."
        )
    return _op(rows, warps, interpret, inputs, state)
