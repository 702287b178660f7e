"""WKV-7 on NVIDIA GPUs: the bodies of the Pallas kernels, each for one head or some of its rows.

The arithmetic is that of `chunk_math`. `forward_kernel` and `state_kernel` loop over the chunks and
scale the state once per chunk; `gradients_kernel` computes one chunk. `token_kernel` follows the
definition. Blocks belong to one head: tokens are [1 T 1 N], states [1 1 Nv Nk], and states of
chunks [1 1 C Nk Nv].
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array

from pallas_kernels import chunk_math, tiles
from pallas_kernels.gpu.segmented_passes import Probes
from pallas_kernels.reference import NAMES, WKVInputs


def _exp2(x: Array) -> Array:
    """Computes 2^x with one instruction.

    The usual function takes four more to keep subnormal results, which are flushed to zero here.
    """
    (result,) = pltriton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result


def _load(ref, at) -> Array:
    """Loads the tokens `at` of a block, in float32."""
    return ref[0, at, 0, :].astype(jnp.float32)


def choose_arithmetic(
    dtype: jnp.dtype, choice: tiles.GPU, interpret: bool
) -> chunk_math.Arithmetic:
    """Chooses the precision of products of a dtype, and the function that computes 2^x."""
    unit = math.log2(math.e)
    if interpret:
        # Pallas's interpreter supports no inline assembly, and CPUs no TF32.
        return chunk_math.Arithmetic(dtype, jnp.exp2, unit)
    return chunk_math.Arithmetic(dtype, _exp2, unit, choice.precision)


def _prepare(
    r,
    log_w,
    a,
    b,
    start,
    tokens: int,
    arithmetic: chunk_math.Arithmetic,
) -> chunk_math.Chunk:
    """Prepares the chunk of r, log_w, a and b that begins at token `start`."""
    # Loading log_w again by halves is cheaper than summing a part of the tile.
    half = tokens // 2
    first = _load(log_w, pl.ds(start, half))
    second = _load(log_w, pl.ds(start + half, half))
    # Columns [Nk 1]: the rows of a state are its keys here.
    halves = (jnp.sum(first, axis=0)[:, None], jnp.sum(second, axis=0)[:, None])
    at = pl.ds(start, tokens)
    return chunk_math.prepare(
        _load(r, at), _load(log_w, at), _load(a, at), _load(b, at), halves, arithmetic
    )


def _chunks_to_walk(tokens, chunk: int, state, probes: Probes | None, span):
    """Returns this program's first chunk, and the one after its last.

    In packed rows these are the chunks of one sequence. An idle program of the probes has none.
    """
    if span is not None:
        return span[0, 0], span[0, 1]
    chunks = tokens.shape[1] // chunk
    if probes is None:
        return 0, chunks
    # The grid is (head, block of values, row).
    first_value = pl.program_id(1) * state.shape[2]
    is_idle = probes.is_idle(pl.program_id(2), first_value)
    # A product instead of a select: JAX 0.10's Triton lowering gives a select of two constants the
    # condition's type.
    return 0, jnp.logical_not(is_idle).astype(jnp.int32) * chunks


def forward_kernel(
    r,
    log_w,
    k,
    v,
    a,
    b,
    start,
    *refs,
    chunk: int,
    arithmetic: chunk_math.Arithmetic,
    probes: Probes | None = None,
    packed: bool = False,
) -> None:
    """Writes the state after the last token and, on request, y and each chunk's S^.

    Args:
        r: tokens, as are the next five; v has a block of the value channels.
        log_w: tokens.
        k: tokens.
        v: tokens.
        a: tokens.
        b: tokens.
        start: the state's rows of those channels.
        *refs: for packed rows the span of chunks, [1 2]; then the outputs: the end state, like
            start, followed by nothing, by y, like v, or by y and the S^ of each chunk.
        chunk: tokens of a chunk.
        arithmetic: of products and exponentials.
        probes: how the segments are probed; None for the main loop.
        packed: whether the rows are packed.
    """
    span, end, *outputs = refs if packed else (None, *refs)

    def walk(i, carry):
        state, rest = carry
        at = pl.ds(i * chunk, chunk)
        prepared = _prepare(r, log_w, a, b, i * chunk, chunk, arithmetic)
        # Scales the state once, by the previous chunk's rest and this one's mid.
        state = state * (rest * prepared.mid)
        # Saved in scaled form: the backward pass's products read S^.
        # These loops run zero times or once, depending on which outputs were requested.
        for starts in outputs[1:]:
            starts[0, 0, i] = state.astype(starts.dtype)
        written = chunk_math.write_products(prepared, _load(k, at), _load(v, at))
        read, state = chunk_math.forward(prepared, written, state)
        for y in outputs[:1]:
            y[0, at, 0, :] = read.astype(y.dtype)
        return state, prepared.rest

    # `chunk_math` has keys as the rows of a state, the op has values.
    carry = (start[0, 0].T, jnp.ones((r.shape[3], 1), jnp.float32))
    first, stop = _chunks_to_walk(r, chunk, start, probes, span)
    state, rest = jax.lax.fori_loop(first, stop, walk, carry)
    # The last chunk's rest is still missing.
    end[0, 0] = (state * rest).T


def state_kernel(
    r,
    log_w,
    a,
    b,
    dy,
    dend,
    *refs,
    chunk: int,
    arithmetic: chunk_math.Arithmetic,
    probes: Probes | None = None,
    packed: bool = False,
) -> None:
    """Writes the start state's gradient and, on request, each chunk's G^.

    Args:
        r: tokens, as are the next four; dy has a block of the value channels.
        log_w: tokens.
        a: tokens.
        b: tokens.
        dy: tokens.
        dend: the rows of those channels of the end state's gradient.
        *refs: for packed rows the span of chunks, [1 2]; then the outputs: the start state's
            gradient, like dend, and on request the G^ of each chunk.
        chunk: tokens of a chunk.
        arithmetic: of products and exponentials.
        probes: how the segments are probed; None for the main loop.
        packed: whether the rows are packed.
    """
    span, dstart, *outputs = refs if packed else (None, *refs)
    first, stop = _chunks_to_walk(r, chunk, dend, probes, span)
    # The loop only counts upwards, so step i computes chunk `last - i`.
    last = r.shape[1] // chunk - 1 if span is None else first + stop - 1

    def walk(done, carry):
        dstate, mid = carry
        i = last - done
        prepared = _prepare(r, log_w, a, b, i * chunk, chunk, arithmetic)
        # Scales once, by the later chunk's mid and this one's rest, as in `forward_kernel`.
        dstate = dstate * (mid * prepared.rest)
        for ends in outputs:
            ends[0, 0, i] = dstate.astype(ends.dtype)
        dys = _load(dy, pl.ds(i * chunk, chunk))
        read = chunk_math.transposed_read_products(prepared)
        z = chunk_math.removal_gradients(prepared, read, dys, dstate)
        return chunk_math.state_gradient(prepared, z, dys, dstate), prepared.mid

    carry = (dend[0, 0].T, jnp.ones((r.shape[3], 1), jnp.float32))
    dstate, mid = jax.lax.fori_loop(first, stop, walk, carry)
    dstart[0, 0] = (dstate * mid).T


def gradients_kernel(
    r,
    log_w,
    k,
    v,
    a,
    b,
    dy,
    starts,
    ends,
    *grads,
    arithmetic: chunk_math.Arithmetic,
) -> None:
    """Writes the gradients of one chunk's r, log_w, k, v, a and b.

    Args:
        r: the chunk's tokens, as are the next six.
        log_w: tokens.
        k: tokens.
        v: tokens.
        a: tokens.
        b: tokens.
        dy: tokens.
        starts: the chunk's S^.
        ends: the chunk's G^.
        *grads: outputs, like the first six.
        arithmetic: of products and exponentials.
    """
    prepared = _prepare(r, log_w, a, b, 0, r.shape[1], arithmetic)
    read = chunk_math.read_products(prepared)
    everything = slice(None)
    ks = _load(k, everything)
    vs = _load(v, everything)
    dys = _load(dy, everything)
    # Scaled and in the tokens' dtype already: they are operands of products as they are.
    states = (starts[0, 0, 0], ends[0, 0, 0])
    written = chunk_math.write_products(prepared, ks, vs)
    u = chunk_math.removals(prepared, read.inverse, written, states[0])
    z = chunk_math.removal_gradients(prepared, read.transposed, dys, states[1])
    # Stores each gradient as soon as it is computed, which frees its registers.
    for name, grad in chunk_math.gradients(prepared, written, u, z, states, dys):
        ref = grads[NAMES.index(name)]
        ref[0, :, 0, :] = grad.astype(ref.dtype)


def token_kernel(*refs) -> None:
    """Writes the state after one token, and y, for a block of rows of a head.

    Args:
        *refs: the token's r, log_w, k, v, a and b, where v has the block's channels; the state's
            rows; then the outputs: the end state's rows, which may alias the state's, and y, like
            v.
    """
    *inputs, start, end, y = refs
    token = WKVInputs(*(_load(ref, 0) for ref in inputs))
    before = start[0, 0]
    removed = jnp.sum(before * token.a[None, :], axis=1)
    after = (
        before * jnp.exp(token.log_w)[None, :]
        + removed[:, None] * token.b[None, :]
        + token.v[:, None] * token.k[None, :]
    )
    end[0, 0] = after
    y[0, 0, 0, :] = jnp.sum(after * token.r[None, :], axis=1).astype(y.dtype)
