"""The arithmetic of one chunk of L tokens, forward and backward, on plain arrays. Level 0.

With cs the running sum of log_w inside the chunk and mid its value at the chunk's middle, the
factors

    ah = a exp(cs_{t-1} - mid)          rh = r exp(cs_t - mid)
    bh = b exp(mid - cs_t)              kh = k exp(mid - cs_t)

and the scaled states S^ = S exp(mid), before the chunk, and S_end = S^_end exp(last - mid), behind
it, turn the recurrence into matrix products:

    U      = T (ah S^' + Aak V)         T = (I - Aab)^-1, Aab = strictly_lower(ah bh'), Aak alike
    Y      = rh S^' + Arb U + Ark V     Arb = lower(rh bh'), Ark = lower(rh kh')
    S^_end = S^ + U' bh + V' kh

and likewise the gradients, with G^ = dS_end exp(last - mid):

    Z      = T' (Arb' dY + bh G^')
    dS^    = G^ + dY' rh + Z' ah        dS = dS^ exp(mid)

Centring at the middle halves the exponents: log_w is above -0.6066, so with L = 64 no factor leaves
e^(+-20). Nothing is divided by the decay. The arrays may carry any leading axes (batch, heads).
Without any, all of it also runs inside a GPU kernel: there are no slices and no cumulative sums.

Source: the WY form of generalised delta rules (DPLR), with the state scaled once per chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Keys = Float[Array, "... L Nk"]
Values = Float[Array, "... L Nv"]
Row = Float[Array, "... 1 Nk"]
Square = Float[Array, "... L L"]
Matrix = Float[Array, "... Nv Nk"]
Tokens = tuple[Keys, Keys, Keys, Values, Keys, Keys]  # r, log_w, k, v, a, b


class Chunk(NamedTuple):
    """What a chunk's tokens determine without a state, and without what they write."""

    ah: Keys
    rh: Keys
    bh: Keys
    before: Keys  # exp(cs_{t-1} - mid)
    upto: Keys  # exp(cs_t - mid)
    after: Keys  # exp(mid - cs_t)
    mid: Row  # exp(mid)
    rest: Row  # exp(last - mid)
    inverse: Square  # T
    arb: Square
    dtype: jnp.dtype  # of the operands of matrix products


class Written(NamedTuple):
    """What a chunk's tokens write."""

    kh: Keys
    v: Values
    aak: Square
    ark: Square


def dot(x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """x @ y with operands of `dtype`, accumulated in float32 or better."""
    if dtype == jnp.bfloat16:
        return jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
    return jnp.matmul(x, y, precision="highest")


def as_operand(x: Array, dtype: jnp.dtype) -> Array:
    """x with the precision that it has as an operand of `dot` in `dtype`, in its own dtype.

    Widened by its bits: XLA may drop a cast there and back.
    """
    if dtype != jnp.bfloat16:
        return x
    bits = jax.lax.bitcast_convert_type(x.astype(dtype), jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)


def indices(side: int) -> tuple[Array, Array]:
    """Row and column of each entry of a square."""
    shape = (side, side)
    return tuple(jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


def sums(signs: Array, x: Keys, dtype: jnp.dtype) -> Keys:
    """signs [L L] @ x, for signs of -1, 0 and 1; beside bfloat16 operands, 16 bits of x count."""
    signs, high = signs.astype(x.dtype), as_operand(x, dtype)
    found = dot(signs, high, dtype)
    return found + dot(signs, x - high, dtype) if dtype == jnp.bfloat16 else found


def lower(x: Square, offset: int = 0) -> Square:
    """`x` with what lies above its diagonal zeroed; `offset` -1 zeroes the diagonal as well.

    A select, not a product with a mask: the masked entries may be large.
    """
    row, column = indices(x.shape[-1])
    return jnp.where(row + offset >= column, x, 0)


def unit_lower_inverse(a: Square, dtype: jnp.dtype) -> Square:
    """(I - a)^-1 of an `a` whose side is a power of two; only what lies below its diagonal counts.

    Pairs of solved diagonal blocks are merged until one is left, so that only true inverses of
    sub-blocks appear. The Neumann product (I + a)(I + a^2)... overflows on repeated keys at L = 64.
    """
    row, column = indices(a.shape[-1])
    inverse, block = jnp.where(row == column, jnp.ones_like(a), 0), 1
    while block < a.shape[-1]:
        # By bits, which are cheaper than quotients: the lower left quarter of each pair of blocks.
        merged = (row ^ column < 2 * block) & (row & block != 0) & (column & block == 0)
        part = jnp.where(merged, a, 0)
        if block > 1:
            part = dot(inverse, dot(part, inverse, dtype), dtype)
        inverse, block = inverse + part, 2 * block
    return inverse


def prepare(r: Keys, log_w: Keys, a: Keys, b: Keys, dtype: jnp.dtype) -> Chunk:
    """The factors and products of a chunk's tokens, all float32 or better.

    Args:
        r: receptance.
        log_w: natural logarithm of the decay.
        a: removal key.
        b: removal key times rate.
        dtype: of the operands of matrix products.
    """
    side = r.shape[-2]
    row, column = indices(side)
    signs = (column <= row).astype(jnp.int32) - (column < side // 2).astype(jnp.int32)
    centred = sums(signs, log_w, dtype)
    exp_before, exp_upto, exp_after = jnp.exp(centred - log_w), jnp.exp(centred), jnp.exp(-centred)
    ah, rh, bh = a * exp_before, r * exp_upto, b * exp_after
    early = jax.lax.broadcasted_iota(jnp.int32, (side, 1), 0) < side // 2
    mid, rest = (
        jnp.exp(jnp.sum(jnp.where(half, log_w, 0), axis=-2, keepdims=True))
        for half in (early, ~early)
    )
    return Chunk(
        ah=ah,
        rh=rh,
        bh=bh,
        before=exp_before,
        upto=exp_upto,
        after=exp_after,
        mid=mid,
        rest=rest,
        inverse=unit_lower_inverse(dot(ah, bh.mT, dtype), dtype),
        arb=lower(dot(rh, bh.mT, dtype)),
        dtype=dtype,
    )


def write(chunk: Chunk, k: Keys, v: Values) -> Written:
    """What keys and values add to a chunk."""
    kh = k * chunk.after
    aak, ark = dot(chunk.ah, kh.mT, chunk.dtype), dot(chunk.rh, kh.mT, chunk.dtype)
    return Written(kh=kh, v=v, aak=lower(aak, -1), ark=lower(ark))


def removals(chunk: Chunk, written: Written, start: Matrix) -> Values:
    """U: what each token removes from the state's rows, given S^."""
    dtype = chunk.dtype
    read = dot(chunk.ah, start.mT, dtype) + dot(written.aak, written.v, dtype)
    return dot(chunk.inverse, read, dtype)


def forward(chunk: Chunk, written: Written, start: Matrix) -> tuple[Values, Matrix]:
    """What the chunk's tokens read, and S^_end behind them, given S^."""
    dtype, (kh, v, _, ark) = chunk.dtype, written
    u = removals(chunk, written, start)
    y = dot(chunk.rh, start.mT, dtype) + dot(chunk.arb, u, dtype) + dot(ark, v, dtype)
    return y, start + dot(u.mT, chunk.bh, dtype) + dot(v.mT, kh, dtype)


def removal_gradients(chunk: Chunk, dy: Values, dend: Matrix) -> Values:
    """Z: the gradients of what each token's removal reads, given G^."""
    dtype = chunk.dtype
    du = dot(chunk.arb.mT, dy, dtype) + dot(chunk.bh, dend.mT, dtype)
    return dot(chunk.inverse.mT, du, dtype)


def state_gradient(chunk: Chunk, z: Values, dy: Values, dend: Matrix) -> Matrix:
    """dS^, given Z and G^."""
    return dend + dot(dy.mT, chunk.rh, chunk.dtype) + dot(z.mT, chunk.ah, chunk.dtype)


def gradients(
    chunk: Chunk, written: Written, states: tuple[Matrix, Matrix], z: Values, dy: Values
) -> Tokens:
    """Gradients of the six inputs.

    Args:
        chunk: from `prepare`.
        written: from `write`.
        states: S^ and G^.
        z: from `removal_gradients`.
        dy: gradient of what was read.
    """
    dtype, (start, dend), (kh, v, aak, ark) = chunk.dtype, states, written
    ah, rh, bh = chunk.ah, chunk.rh, chunk.bh
    u = removals(chunk, written, start)
    dv = dot(ark.mT, dy, dtype) + dot(aak.mT, z, dtype) + dot(kh, dend.mT, dtype)
    dab, dak = lower(dot(z, u.mT, dtype), -1), lower(dot(z, v.mT, dtype), -1)
    drb, drk = lower(dot(dy, u.mT, dtype)), lower(dot(dy, v.mT, dtype))
    dr = dot(drb, bh, dtype) + dot(drk, kh, dtype) + dot(dy, start, dtype)
    da = dot(dab, bh, dtype) + dot(dak, kh, dtype) + dot(z, start, dtype)
    db_inside = dot(dab.mT, ah, dtype) + dot(drb.mT, rh, dtype)
    dk_inside = dot(dak.mT, ah, dtype) + dot(drk.mT, rh, dtype)
    db_end, dk_end = dot(u, dend, dtype), dot(v, dend, dtype)
    # The decay's gradient: what a token's decay touches inside the chunk reaches it from behind,
    # what it touches of the end state from before it; written so, the two never cancel. Inside, a
    # pair of tokens adds the same number behind one and takes it off behind the other: all of it
    # where the two are one token. That holds only if the factors are those of the products, so
    # they are rounded alike; unrounded ones cost bfloat16 a digit wherever dy resembles v.
    near_r, near_a, near_b, near_k = (as_operand(x, dtype) for x in (rh, ah, bh, kh))
    removal = near_a * da
    inside = near_r * dr + removal - near_b * db_inside - near_k * dk_inside
    to_end = near_b * db_end + near_k * dk_end
    row, column = indices(dy.shape[-2])
    dlog_w = sums(column >= row, inside, dtype) - removal + sums(column < row, to_end, dtype)
    ends = start.astype(dlog_w.dtype) * dend.astype(dlog_w.dtype)
    dlog_w = dlog_w + jnp.sum(ends, axis=-2, keepdims=True)
    dk, db = (dk_inside + dk_end) * chunk.after, (db_inside + db_end) * chunk.after
    return dr * chunk.upto, dlog_w, dk, dv, da * chunk.before, db
