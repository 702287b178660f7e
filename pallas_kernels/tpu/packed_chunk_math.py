"""The arithmetic of one chunk of the heads of one tile, on plain arrays.

This is `chunk_math` restated for the TPU's layout; no code is shared. The letters and equations are
those of `chunk_math`, with these differences:

* Arrays hold all heads of a tile (see `head_packing`), so masks select by head as well.
* Products that share an operand are one product of concatenated operands, which fills the matrix
  unit.
* States have values as rows.
* Running sums of the decay use natural logarithms, and mid and rest are row vectors.

tests/kernels/test_packed_chunk_math.py compares the two on plain arrays, without Pallas.

A product has a long latency. Functions that return a `Generator` therefore yield None between their
stages, where the instructions of another group of heads may be inserted
(`kernel_bodies.interleave`). Their result is the generator's return value:
`chunk = yield from prepare(...)`.
"""

from collections.abc import Generator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.reference import WKVInputs
from pallas_kernels.tpu.head_packing import (
    Masks,
    TileLayout,
    iota,
    repeat,
    stack,
    unstack,
)


class Factors(NamedTuple):
    """Exponentials of a chunk's running decays, centred at its middle; see `chunk_math.Chunk`."""

    before: Array  # [L W]
    upto: Array  # [L W]
    after: Array  # [L W]
    mid: Array  # [1 W]
    rest: Array  # [1 W]


class Chunk(NamedTuple):
    """A chunk's stacks and the products between its tokens, in the dtype of operands.

    The names are those of `chunk_math`: `ah` to `kh` and `v` are [R W], the others [R R].
    """

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


class Parts(NamedTuple):
    """A gradient in two parts: from tokens of the chunk, and from the states at its two ends."""

    inside: Array
    outside: Array


class KeyGradients(NamedTuple):
    """Gradients of rh, kh, ah and bh, [L W]."""

    r: Parts
    k: Parts
    a: Parts
    b: Parts


def dot(x: Array, y: Array, *, left: int = 1, right: int = 0) -> Array:
    """Multiplies over axis `left` of x and `right` of y, summing in float32."""
    # HIGHEST: a float32 product would otherwise be computed in bfloat16.
    precision = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    axes = (((left,), (right,)), ((), ()))
    return jax.lax.dot_general(
        x,
        y,
        axes,
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def sums(signs: Array, x: Array, layout: TileLayout) -> Array:
    """Computes signs @ x for entries of -1, 0 and 1, with exact products.

    With bfloat16 operands x is split into two of 8 bits each, which keeps 16 bits of it.
    """
    if layout.dtype != jnp.bfloat16:
        return dot(signs, x)
    # Bitwise: compilers may drop a cast to bfloat16 and back.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    signs = signs.astype(jnp.bfloat16)
    # One product of twice the depth instead of two: the matrix unit adds them.
    halves = jnp.concatenate([high, x - high], 0).astype(jnp.bfloat16)
    return dot(jnp.concatenate([signs, signs], 1), halves)


def _keep(mask: Array, product: Array, layout: TileLayout) -> Array:
    """Zeroes a product outside a mask and casts it to the operands' dtype."""
    return jnp.where(mask, product, 0.0).astype(layout.dtype)


def _compute_factors(log_w: Array, layout: TileLayout) -> Factors:
    square = (layout.chunk, layout.chunk)
    row = iota(square, 0)
    column = iota(square, 1)
    upto_row = (row >= column).astype(jnp.float32)
    # Every row subtracts the sum over the first half.
    first_half = (column < layout.chunk // 2).astype(jnp.float32)
    # The running sum of log_w minus its value at the middle.
    centred = sums(upto_row - first_half, log_w, layout)
    return Factors(
        before=jnp.exp(centred - log_w),
        upto=jnp.exp(centred),
        after=jnp.exp(-centred),
        # centred is cs_t - mid: its first row is log_w of the first token minus mid.
        mid=jnp.exp(log_w[:1] - centred[:1]),
        # The last row of centred is last - mid.
        rest=jnp.exp(centred[layout.chunk - 1 :]),
    )


def _invert(
    aab: Array, masks: Masks, layout: TileLayout
) -> Generator[None, None, Array]:
    """Computes (I - aab)^-1 by merging inverted diagonal blocks; see `chunk_math`."""
    square = (layout.rows, layout.rows)
    inverse = (iota(square, 0) == iota(square, 1)).astype(jnp.float32)
    # Blocks of two rows need no product.
    inverse = inverse + jnp.where(masks.merges[0], aab, 0.0)
    for merge in masks.merges[1:]:
        operand = inverse.astype(layout.dtype)
        right = dot(_keep(merge, aab, layout), operand).astype(layout.dtype)
        yield
        inverse = inverse + dot(operand, right)
        yield
    return inverse.astype(layout.dtype)


def prepare(
    tokens: WKVInputs, masks: Masks, layout: TileLayout
) -> Generator[None, None, Chunk]:
    """Computes the part of a chunk that does not depend on the state.

    Args:
        tokens: [L W] each, float32; the heads of a tile side by side.
        masks: of the layout.
        layout: the sizes.
    """
    rows = layout.rows
    factors = _compute_factors(tokens.log_w, layout)
    yield
    ah = stack(tokens.a * factors.before, masks.key_head, layout)
    rh = stack(tokens.r * factors.upto, masks.key_head, layout)
    bh = repeat(tokens.b * factors.after, layout)
    kh = repeat(tokens.k * factors.after, layout)
    # Rows are ah, then rh; columns are bh, then kh.
    products = dot(jnp.concatenate([ah, rh], 0), jnp.concatenate([bh, kh], 0), right=1)
    yield
    # Stays float32: the inverse is built from it.
    aab = jnp.where(masks.strict, products[:rows, :rows], 0.0)
    inverse = yield from _invert(aab, masks, layout)
    return Chunk(
        factors=factors,
        ah=ah,
        rh=rh,
        bh=bh,
        kh=kh,
        v=stack(tokens.v, masks.value_head, layout),
        inverse=inverse,
        aak=_keep(masks.strict, products[:rows, rows:], layout),
        arb=_keep(masks.lower, products[rows:, :rows], layout),
        ark=_keep(masks.lower, products[rows:, rows:], layout),
    )


def writes(
    chunk: Chunk, start: Array, layout: TileLayout
) -> Generator[None, None, Array]:
    """Computes U, what each token removes from the state, and stacks it on V, [2R Wv].

    Args:
        chunk: from `prepare`.
        start: S^, an operand.
        layout: the sizes.
    """
    read = dot(chunk.ah, start, right=1) + dot(chunk.aak, chunk.v)
    yield
    u = dot(chunk.inverse, read.astype(layout.dtype)).astype(layout.dtype)
    yield
    return jnp.concatenate([u, chunk.v], 0)


def outputs(
    chunk: Chunk,
    written: Array,
    start: Array,
    masks: Masks,
    layout: TileLayout,
) -> Array:
    """Computes what the chunk's tokens read, [L Wv]."""
    y = dot(chunk.rh, start, right=1)
    y = y + dot(jnp.concatenate([chunk.arb, chunk.ark], 1), written)
    return unstack(y, masks.value_head, layout)


def end_state(chunk: Chunk, written: Array, scaled: Array, masks: Masks) -> Array:
    """Computes the state after the chunk from S^ in float32, both block diagonal."""
    # The mask below removes the products of different heads, off the diagonal blocks.
    end = scaled + dot(written, jnp.concatenate([chunk.bh, chunk.kh], 0), left=0)
    return jnp.where(masks.blocks, end, 0.0) * chunk.factors.rest


def removals_and_gradients(
    chunk: Chunk,
    dy: Array,
    start: Array,
    dend: Array,
    layout: TileLayout,
) -> Generator[None, None, tuple[Array, Array]]:
    """Computes U and Z, the gradients of what each token's removal reads, [R Wv] each.

    Args:
        chunk: from `prepare`.
        dy: gradient of what the tokens read, a stack.
        start: S^, an operand.
        dend: G^, an operand.
        layout: the sizes.
    """
    read = dot(chunk.ah, start, right=1) + dot(chunk.aak, chunk.v)
    du = dot(chunk.arb, dy, left=0) + dot(chunk.bh, dend, right=1)
    yield
    u = dot(chunk.inverse, read.astype(layout.dtype)).astype(layout.dtype)
    z = dot(chunk.inverse, du.astype(layout.dtype), left=0).astype(layout.dtype)
    yield
    return u, z


def value_gradient(
    chunk: Chunk,
    z: Array,
    dy: Array,
    dend: Array,
    masks: Masks,
    layout: TileLayout,
) -> Array:
    """Computes the gradient of v, [L Wv]."""
    pairs = jnp.concatenate([chunk.ark, chunk.aak], 0)
    dv = dot(pairs, jnp.concatenate([dy, z], 0), left=0)
    dv = dv + dot(chunk.kh, dend, right=1)
    return unstack(dv, masks.value_head, layout)


def start_gradient(
    chunk: Chunk,
    z: Array,
    dy: Array,
    dscaled: Array,
    masks: Masks,
) -> Array:
    """Computes the gradient of the state before the chunk from G^ in float32."""
    arriving = jnp.concatenate([dy, z], 0)
    readers = jnp.concatenate([chunk.rh, chunk.ah], 0)
    dstart = dscaled + dot(arriving, readers, left=0)
    return jnp.where(masks.blocks, dstart, 0.0) * chunk.factors.mid


def pair_gradients(chunk: Chunk, u: Array, z: Array, dy: Array) -> Array:
    """Computes the unmasked gradients of the products between tokens, [2R 2R].

    Rows are a, then r; columns are b, then k.
    """
    return dot(jnp.concatenate([z, dy], 0), jnp.concatenate([u, chunk.v], 0), right=1)


def key_gradients(
    chunk: Chunk,
    pairs: Array,
    u: Array,
    z: Array,
    dy: Array,
    start: Array,
    dend: Array,
    masks: Masks,
    layout: TileLayout,
) -> KeyGradients:
    """Computes the gradients of rh, kh, ah and bh.

    Args:
        chunk: from `prepare`.
        pairs: from `pair_gradients`.
        u: from `removals_and_gradients`, as z.
        z: see u.
        dy: gradient of what the tokens read, a stack.
        start: S^, an operand.
        dend: G^, an operand.
        masks: of the layout.
        layout: the sizes.
    """
    rows = layout.rows
    dab = _keep(masks.strict, pairs[:rows, :rows], layout)
    dak = _keep(masks.strict, pairs[:rows, rows:], layout)
    drb = _keep(masks.lower, pairs[rows:, :rows], layout)
    drk = _keep(masks.lower, pairs[rows:, rows:], layout)
    # Products that share an operand are one.
    writers = jnp.concatenate([chunk.bh, chunk.kh], 0)
    readers = jnp.concatenate([chunk.ah, chunk.rh], 0)
    # "outside" passes through the states at the chunk's ends; the decay needs it separately.
    dr = dot(jnp.concatenate([drb, drk], 1), writers)
    dr_outside = dot(dy, start)
    dk = dot(jnp.concatenate([dak, drk], 0), readers, left=0)
    dk_outside = dot(chunk.v, dend)
    da = dot(jnp.concatenate([dab, dak], 1), writers)
    da_outside = dot(z, start)
    db = dot(jnp.concatenate([dab, drb], 0), readers, left=0)
    db_outside = dot(u, dend)

    def parts(inside, outside):
        return Parts(
            unstack(inside, masks.key_head, layout),
            unstack(outside, masks.key_head, layout),
        )

    return KeyGradients(
        r=parts(dr, dr_outside),
        k=parts(dk, dk_outside),
        a=parts(da, da_outside),
        b=parts(db, db_outside),
    )


def decay_gradient(
    chunk: Chunk,
    grads: KeyGradients,
    ends: Array,
    masks: Masks,
    layout: TileLayout,
) -> Array:
    """Computes the gradient of log_w, [L W].

    `chunk_math.gradients` explains why it uses the rounded operands.

    Args:
        chunk: from `prepare`.
        grads: from `key_gradients`.
        ends: [1 W], the sum over values of S^ times G^ in float32.
        masks: of the layout.
        layout: the sizes.
    """
    r = unstack(chunk.rh.astype(jnp.float32), masks.key_head, layout)
    k = unstack(chunk.kh.astype(jnp.float32), masks.key_head, layout)
    a = unstack(chunk.ah.astype(jnp.float32), masks.key_head, layout)
    b = unstack(chunk.bh.astype(jnp.float32), masks.key_head, layout)
    removal = a * (grads.a.inside + grads.a.outside)
    inside = r * (grads.r.inside + grads.r.outside) + removal
    inside = inside - b * grads.b.inside - k * grads.k.inside
    to_end = b * grads.b.outside + k * grads.k.outside
    square = (layout.chunk, layout.chunk)
    row = iota(square, 0)
    column = iota(square, 1)
    from_row_on = (row <= column).astype(jnp.float32)
    before_row = (row > column).astype(jnp.float32)
    signs = jnp.concatenate([from_row_on, before_row], 1)
    return sums(signs, jnp.concatenate([inside, to_end], 0), layout) - removal + ends
