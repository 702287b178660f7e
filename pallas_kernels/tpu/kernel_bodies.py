"""WKV-7 on TPU, the bodies of the kernels: one chunk of tokens of some groups of heads.

Arrays stay [B, T, H*N]. Small heads share a tile: with two heads of 64, a token's lanes are those
of both, the rows of the two heads are stacked one above the other with the other head's lanes
zeroed, and the state is block diagonal, so that every product is a full tile and heads never mix.
Some groups of heads go through a grid step together, stage by stage: one group's products fill the
time in which another's results are on their way. The arithmetic is that of `chunk_math`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.tpu.head_packing import (
    Masks,
    TileLayout,
    compact,
    dot,
    expand,
    interleave,
    iota,
    load,
    make_masks,
    repeat,
    stack,
    store,
    sums,
    unstack,
)


class Factors(NamedTuple):
    """The exponentials of a chunk's running decays around its middle; see `chunk_math`."""

    before: Array
    upto: Array
    after: Array
    mid: Array
    rest: Array


def _factors(log_w: Array, form: TileLayout) -> Factors:
    square = (form.chunk, form.chunk)
    row, column = iota(square, 0), iota(square, 1)
    upto_row = (row >= column).astype(jnp.float32)
    centred = sums(upto_row - (column < form.chunk // 2).astype(jnp.float32), log_w, form)
    return Factors(
        before=jnp.exp(centred - log_w),
        upto=jnp.exp(centred),
        after=jnp.exp(-centred),
        mid=jnp.exp(log_w[:1] - centred[:1]),
        rest=jnp.exp(centred[form.chunk - 1 :]),
    )


def _inverse(aab: Array, masks: Masks, form: TileLayout) -> Iterator[Array | None]:
    """(I - aab)^-1 by merging solved blocks; a stage each, the last one's is the result."""
    square = (form.rows, form.rows)
    inverse = (iota(square, 0) == iota(square, 1)).astype(jnp.float32)
    inverse = inverse + jnp.where(masks.merges[0], aab, 0.0)
    for merge in masks.merges[1:]:
        operand = inverse.astype(form.dtype)
        right = dot(jnp.where(merge, aab, 0.0).astype(form.dtype), operand).astype(form.dtype)
        yield None
        inverse = inverse + dot(operand, right)
        yield None
    yield inverse.astype(form.dtype)


class Chunk(NamedTuple):
    """A chunk's stacks and products between its tokens, as operands; see `chunk_math.Chunk`."""

    factors: Factors
    ah: Array
    rh: Array
    bh: Array
    kh: Array
    v: Array
    inverse: Array
    aak: Array
    arb: Array
    ark: Array


def _prepare(tokens, masks: Masks, form: TileLayout) -> Iterator[Chunk | None]:
    """What a chunk's tokens determine without a state, stage by stage."""
    r, log_w, k, v, a, b = tokens
    factors = _factors(log_w, form)
    yield None
    ah = stack(a * factors.before, masks.key_head, form)
    rh = stack(r * factors.upto, masks.key_head, form)
    bh, kh = repeat(b * factors.after, form), repeat(k * factors.after, form)
    products = dot(jnp.concatenate([ah, rh], 0), jnp.concatenate([bh, kh], 0), right=1)
    yield None
    rows = form.rows

    def kept(mask, part):
        return jnp.where(mask, part, 0.0).astype(form.dtype)

    inverse = None
    for inverse in _inverse(jnp.where(masks.strict, products[:rows, :rows], 0.0), masks, form):
        if inverse is None:
            yield None
    yield Chunk(
        factors=factors,
        ah=ah,
        rh=rh,
        bh=bh,
        kh=kh,
        v=stack(v, masks.value_head, form),
        inverse=inverse,
        aak=kept(masks.strict, products[:rows, rows:]),
        arb=kept(masks.lower, products[rows:, :rows]),
        ark=kept(masks.lower, products[rows:, rows:]),
    )


def _forward_group(g: int, refs, state, masks: Masks, form: TileLayout) -> Iterator[None]:
    *inputs, y_ref, starts_ref = refs
    chunk = None
    for chunk in _prepare(load(inputs, g, form), masks, form):
        if chunk is None:
            yield
    start = state[g]
    if starts_ref is not None:
        starts_ref[0, g, 0] = compact(start, form)
    scaled = start * chunk.factors.mid
    operand = scaled.astype(form.dtype)
    read = dot(chunk.ah, operand, right=1) + dot(chunk.aak, chunk.v)
    yield
    u = dot(chunk.inverse, read.astype(form.dtype)).astype(form.dtype)
    yield
    written = jnp.concatenate([u, chunk.v], 0)
    y = dot(chunk.rh, operand, right=1)
    y = y + dot(jnp.concatenate([chunk.arb, chunk.ark], 1), written)
    store(y_ref, g, unstack(y, masks.value_head, form))
    end = scaled + dot(written, jnp.concatenate([chunk.bh, chunk.kh], 0), left=0)
    state[g] = jnp.where(masks.blocks, end, 0.0) * chunk.factors.rest


def forward_kernel(*refs, form: TileLayout, save: bool) -> None:
    """One chunk of some groups: what its tokens read, and the state behind them."""
    *tokens, start_ref, y_ref, end_ref, rest = *refs[:9], refs[9:]
    starts_ref, state = rest if save else (None, *rest)
    masks, step = make_masks(form), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        for g in range(form.groups):
            state[g] = expand(start_ref[0, g], masks, form)

    refs = (*tokens, y_ref, starts_ref)
    interleave([_forward_group(g, refs, state, masks, form) for g in range(form.groups)])

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for g in range(form.groups):
            end_ref[0, g] = compact(state[g], form)


def _backward_group(g: int, refs, dstate, masks: Masks, form: TileLayout) -> Iterator[None]:
    *inputs, dy_ref, starts_ref = refs[:8]
    tokens = load((*inputs, dy_ref), g, form)
    chunk = None
    for chunk in _prepare(tokens[:6], masks, form):
        if chunk is None:
            yield
    kind, factors = form.dtype, chunk.factors
    dy = stack(tokens[6], masks.value_head, form)
    scaled = expand(starts_ref[0, g, 0], masks, form) * factors.mid
    dscaled = dstate[g] * factors.rest
    start, dend = scaled.astype(kind), dscaled.astype(kind)
    read = dot(chunk.ah, start, right=1) + dot(chunk.aak, chunk.v)
    du = dot(chunk.arb, dy, left=0) + dot(chunk.bh, dend, right=1)
    yield
    u = dot(chunk.inverse, read.astype(kind)).astype(kind)
    z = dot(chunk.inverse, du.astype(kind), left=0).astype(kind)
    yield
    dv = dot(jnp.concatenate([chunk.ark, chunk.aak], 0), jnp.concatenate([dy, z], 0), left=0)
    dv = dv + dot(chunk.kh, dend, right=1)
    store(refs[11], g, unstack(dv, masks.value_head, form))
    dstart = dscaled + dot(
        jnp.concatenate([dy, z], 0), jnp.concatenate([chunk.rh, chunk.ah], 0), left=0
    )
    dstate[g] = jnp.where(masks.blocks, dstart, 0.0) * factors.mid
    products = dot(jnp.concatenate([z, dy], 0), jnp.concatenate([u, chunk.v], 0), right=1)
    yield
    grads = _key_gradients(chunk, products, (u, z, dy, start, dend), masks, form)
    yield
    decay = _decay_gradient(chunk, grads, jnp.sum(scaled * dscaled, 0, keepdims=True), masks, form)
    scales = (factors.upto, factors.after, factors.before, factors.after)
    outputs = (refs[8], refs[10], refs[12], refs[13])
    for ref, (inside, outside), scale in zip(outputs, grads, scales, strict=True):
        store(ref, g, (inside + outside) * scale)
    store(refs[9], g, decay)


def _key_gradients(chunk: Chunk, products, operands, masks: Masks, form: TileLayout):
    """Of rh, kh, ah, bh each: the part from tokens of the chunk, and that from its two states."""
    u, z, dy, start, dend = operands
    rows = form.rows

    def kept(mask, part):
        return jnp.where(mask, part, 0.0).astype(form.dtype)

    dab, dak = (
        kept(masks.strict, products[:rows, :rows]),
        kept(masks.strict, products[:rows, rows:]),
    )
    drb, drk = kept(masks.lower, products[rows:, :rows]), kept(masks.lower, products[rows:, rows:])
    right, left = jnp.concatenate([chunk.bh, chunk.kh], 0), jnp.concatenate([chunk.ah, chunk.rh], 0)
    pairs = (
        (dot(jnp.concatenate([drb, drk], 1), right), dot(dy, start)),
        (dot(jnp.concatenate([dak, drk], 0), left, left=0), dot(chunk.v, dend)),
        (dot(jnp.concatenate([dab, dak], 1), right), dot(z, start)),
        (dot(jnp.concatenate([dab, drb], 0), left, left=0), dot(u, dend)),
    )
    return [tuple(unstack(x, masks.key_head, form) for x in pair) for pair in pairs]


def _decay_gradient(chunk: Chunk, grads, ends: Array, masks: Masks, form: TileLayout) -> Array:
    """Of log_w; `chunk_math.backward` says why the factors are the operands themselves."""
    (dr, dr_start), (dk, dk_end), (da, da_start), (db, db_end) = grads
    stacks = (chunk.rh, chunk.kh, chunk.ah, chunk.bh)
    r, k, a, b = (unstack(x.astype(jnp.float32), masks.key_head, form) for x in stacks)
    removal = a * (da + da_start)
    inside = r * (dr + dr_start) + removal - b * db - k * dk
    to_end = b * db_end + k * dk_end
    square = (form.chunk, form.chunk)
    row, column = iota(square, 0), iota(square, 1)
    behind, before = (row <= column).astype(jnp.float32), (row > column).astype(jnp.float32)
    signs = jnp.concatenate([behind, before], 1)
    return sums(signs, jnp.concatenate([inside, to_end], 0), form) - removal + ends


def backward_kernel(*refs, form: TileLayout) -> None:
    """One chunk of some groups, the last chunk first: gradients of its inputs and start state."""
    inputs, dend_ref, outputs, dstart_ref, dstate = refs[:8], refs[8], refs[9:15], *refs[15:]
    masks, step = make_masks(form), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        for g in range(form.groups):
            dstate[g] = expand(dend_ref[0, g], masks, form)

    group_refs = (*inputs, *outputs)
    interleave([_backward_group(g, group_refs, dstate, masks, form) for g in range(form.groups)])

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for g in range(form.groups):
            dstart_ref[0, g] = compact(dstate[g], form)
