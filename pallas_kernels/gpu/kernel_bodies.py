"""WKV-7 on NVIDIA GPUs, the bodies of the Pallas kernels: one head, or some of its rows.

The arithmetic is that of `chunk_math`. `forward_kernel` and `state_kernel` walk the chunks, with
the state scaled once a chunk; `gradients_kernel` sees one chunk. Blocks of tokens are [1 T 1 N],
those of states [1 1 Nv Nk], those of chunks' states [1 1 C Nk Nv], all of one head.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array

from pallas_kernels import chunk_math
from pallas_kernels.reference import NAMES


def _exp2(x: Array) -> Array:
    """2^x by one instruction; the usual one takes four more, for results below the normal range."""
    (found,) = pltriton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return found


def _load(refs, at) -> list[Array]:
    """Some tokens of each block, in float32."""
    return [ref[0, at, 0, :].astype(jnp.float32) for ref in refs]


def _prepare(refs, start, tokens: int, dtype: jnp.dtype, interpret) -> chunk_math.Chunk:
    """The chunk of r, log_w, a and b that begins at token `start`."""
    exp = jnp.exp2 if interpret else _exp2
    # Loaded again by halves: cheaper than sums over a part of what is there.
    halves = _load(refs[1:2], pl.ds(start, tokens // 2))
    halves += _load(refs[1:2], pl.ds(start + tokens // 2, tokens // 2))
    halves = tuple(jnp.sum(x, axis=0)[:, None] for x in halves)
    how = chunk_math.Arithmetic(dtype, exp, math.log2(math.e))
    return chunk_math.prepare(*_load(refs, pl.ds(start, tokens)), halves, how)


def forward_kernel(r, log_w, k, v, a, b, start, end, *outputs, chunk: int, interpret=False) -> None:
    """The state behind the last token; where asked for what tokens read, and each chunk's S^.

    Args:
        r: tokens, as the next five; of v some of the channels.
        log_w: tokens.
        k: tokens.
        v: tokens.
        a: tokens.
        b: tokens.
        start: those channels' rows of the state.
        end: as start, written.
        *outputs: nothing; or y, as v; or y and S^, as chunks' states.
        chunk: tokens of a chunk.
        interpret: whether Pallas's interpreter runs this.
    """

    def walk(i, carry):
        state, rest = carry
        at = pl.ds(i * chunk, chunk)
        made = _prepare((r, log_w, a, b), i * chunk, chunk, v.dtype, interpret)
        state = state * (rest * made.mid)
        for starts in outputs[1:]:
            starts[0, 0, i] = state.astype(starts.dtype)
        read, state = chunk_math.forward(made, chunk_math.write(made, *_load((k, v), at)), state)
        for y in outputs[:1]:
            y[0, at, 0, :] = read.astype(y.dtype)
        return state, made.rest

    whole = (start[0, 0].T, jnp.ones((r.shape[3], 1), jnp.float32))
    state, rest = jax.lax.fori_loop(0, r.shape[1] // chunk, walk, whole)
    end[0, 0] = (state * rest).T


def state_kernel(r, log_w, a, b, dy, dend, dstart, *outputs, chunk: int, interpret=False) -> None:
    """The start state's gradient and, where asked for, each chunk's G^.

    Args:
        r: tokens, as the next four; of dy some of the channels.
        log_w: tokens.
        a: tokens.
        b: tokens.
        dy: tokens.
        dend: those channels' rows of the end state's gradient.
        dstart: as dend, written.
        *outputs: G^ as chunks' states, or nothing.
        chunk: tokens of a chunk.
        interpret: whether Pallas's interpreter runs this.
    """
    chunks = r.shape[1] // chunk

    def walk(done, carry):
        dstate, mid = carry
        i = chunks - 1 - done
        made = _prepare((r, log_w, a, b), i * chunk, chunk, dy.dtype, interpret)
        dstate = dstate * (mid * made.rest)
        for ends in outputs:
            ends[0, 0, i] = dstate.astype(ends.dtype)
        (dys,) = _load([dy], pl.ds(i * chunk, chunk))
        z = chunk_math.removal_gradients(made, chunk_math.read_backwards(made), dys, dstate)
        return chunk_math.state_gradient(made, z, dys, dstate), made.mid

    whole = (dend[0, 0].T, jnp.ones((r.shape[3], 1), jnp.float32))
    dstate, mid = jax.lax.fori_loop(0, chunks, walk, whole)
    dstart[0, 0] = (dstate * mid).T


def gradients_kernel(r, log_w, k, v, a, b, dy, starts, ends, *grads, interpret=False) -> None:
    """Gradients of one chunk's r, log_w, k, v, a and b.

    Args:
        r: tokens, all of the chunk, as the next six.
        log_w: tokens.
        k: tokens.
        v: tokens.
        a: tokens.
        b: tokens.
        dy: tokens.
        starts: the chunk's S^.
        ends: the chunk's G^.
        *grads: as the first six, written.
        interpret: whether Pallas's interpreter runs this.
    """
    made = _prepare((r, log_w, a, b), 0, r.shape[1], v.dtype, interpret)
    read = chunk_math.read(made)
    ks, vs, dys = _load((k, v, dy), slice(None))
    states = (starts[0, 0, 0], ends[0, 0, 0])
    written = chunk_math.write(made, ks, vs)
    u = chunk_math.removals(made, read.inverse, written, states[0])
    z = chunk_math.removal_gradients(made, read.transposed, dys, states[1])
    for name, grad in chunk_math.gradients(made, written, u, z, states, dys):
        ref = grads[NAMES.index(name)]
        ref[0, :, 0, :] = grad.astype(ref.dtype)
