"""The arithmetic of one chunk of L tokens, forward and backward, on plain arrays. Level 0.

With cs the running sum of log_w inside the chunk and mid its value at the chunk's middle, the
factors

    ah = a exp(cs_{t-1} - mid)          rh = r exp(cs_t - mid)
    bh = b exp(mid - cs_t)              kh = k exp(mid - cs_t)

and the scaled start state S^ = S exp(mid) turn the recurrence into matrix products:

    U  = T (ah S^' + Aak V)             T = (I - Aab)^-1, Aab = strictly_lower(ah bh'), Aak alike
    Y  = rh S^' + Arb U + Ark V         Arb = lower(rh bh'), Ark = lower(rh kh')
    S <- (S^ + U' bh + V' kh) exp(last - mid)

Centring at the middle halves the exponents: log_w is above -0.6066, so with L = 64 no factor leaves
e^(+-20). Nothing is divided by the decay. The arrays may carry any leading axes (batch, heads).

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
    """One chunk's factors and token-to-token products; `dtype` is that of matmul operands."""

    v: Values
    ah: Keys
    rh: Keys
    bh: Keys
    kh: Keys
    before: Keys  # exp(cs_{t-1} - mid)
    upto: Keys  # exp(cs_t - mid)
    after: Keys  # exp(mid - cs_t)
    mid: Row  # exp(mid)
    rest: Row  # exp(last - mid)
    inverse: Square  # T
    aak: Square
    arb: Square
    ark: Square
    dtype: jnp.dtype


def dot(x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """x @ y with operands of `dtype`, accumulated in float32 or better."""
    if dtype == jnp.bfloat16:
        return jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
    return jnp.matmul(x, y, precision="highest")


def as_operand(x: Array, dtype: jnp.dtype) -> Array:
    """x with the precision that it has as an operand of `dot` in `dtype`, in its own dtype.

    No cast there and back: XLA may drop that pair.
    """
    return jax.lax.reduce_precision(x, 8, 7) if dtype == jnp.bfloat16 else x


def lower(x: Square, offset: int = 0) -> Square:
    """`x` with what lies above its diagonal zeroed; `offset` -1 zeroes the diagonal as well.

    A select, not a product with a mask: the masked entries may be large.
    """
    row, column = jnp.arange(x.shape[-2])[:, None], jnp.arange(x.shape[-1])[None, :]
    return jnp.where(row + offset >= column, x, 0)


def unit_lower_inverse(a: Square, dtype: jnp.dtype) -> Square:
    """(I - a)^-1 of a strictly lower triangular `a` whose side is a power of two.

    Pairs of solved diagonal blocks are merged until one is left, so that only true inverses of
    sub-blocks appear. The Neumann product (I + a)(I + a^2)... overflows on repeated keys at L = 64.
    """
    side = a.shape[-1]
    row, column = jnp.arange(side)[:, None], jnp.arange(side)[None, :]
    inverse = jnp.broadcast_to(jnp.eye(side, dtype=a.dtype), a.shape)
    block = 1
    while block < side:
        pair = row // (2 * block) == column // (2 * block)
        below = pair & (row // block % 2 == 1) & (column // block % 2 == 0)
        inverse = inverse + dot(inverse, dot(jnp.where(below, a, 0), inverse, dtype), dtype)
        block *= 2
    return inverse


def prepare(inputs: Tokens, dtype: jnp.dtype) -> Chunk:
    """All that a chunk's tokens determine without a state.

    Args:
        inputs: r, log_w, k, v, a, b, each [... L N*], float32 or better.
        dtype: of the operands of matrix products.
    """
    r, log_w, k, v, a, b = inputs
    upto = jnp.cumsum(log_w, axis=-2)
    middle = max(upto.shape[-2] // 2 - 1, 0)
    mid, last = upto[..., middle : middle + 1, :], upto[..., -1:, :]
    exp_before, exp_upto = jnp.exp(upto - log_w - mid), jnp.exp(upto - mid)
    exp_after = jnp.exp(mid - upto)
    ah, rh, bh, kh = a * exp_before, r * exp_upto, b * exp_after, k * exp_after
    return Chunk(
        v=v,
        ah=ah,
        rh=rh,
        bh=bh,
        kh=kh,
        before=exp_before,
        upto=exp_upto,
        after=exp_after,
        mid=jnp.exp(mid),
        rest=jnp.exp(last - mid),
        inverse=unit_lower_inverse(lower(dot(ah, bh.mT, dtype), -1), dtype),
        aak=lower(dot(ah, kh.mT, dtype), -1),
        arb=lower(dot(rh, bh.mT, dtype)),
        ark=lower(dot(rh, kh.mT, dtype)),
        dtype=dtype,
    )


def removals(chunk: Chunk, scaled: Matrix) -> Values:
    """U: what each token removes from the state's rows, given the scaled start state."""
    dtype = chunk.dtype
    return dot(
        chunk.inverse, dot(chunk.ah, scaled.mT, dtype) + dot(chunk.aak, chunk.v, dtype), dtype
    )


def forward(inputs: Tokens, state: Matrix, dtype: jnp.dtype) -> tuple[Values, Matrix]:
    """What the chunk's tokens read, and the state behind them."""
    chunk = prepare(inputs, dtype)
    scaled = state * chunk.mid
    u = removals(chunk, scaled)
    y = dot(chunk.rh, scaled.mT, dtype) + dot(chunk.arb, u, dtype) + dot(chunk.ark, chunk.v, dtype)
    end = scaled + dot(u.mT, chunk.bh, dtype) + dot(chunk.v.mT, chunk.kh, dtype)
    return y, end * chunk.rest


def backward(
    inputs: Tokens, state: Matrix, dy: Values, dend: Matrix, *, dtype: jnp.dtype
) -> tuple[Tokens, Matrix]:
    """Gradients of the six inputs and of the start state, everything recomputed from that state.

    Args:
        inputs: as for `forward`.
        state: at the chunk's start.
        dy: gradient of what was read.
        dend: gradient of the state behind the chunk.
        dtype: of the operands of matrix products.
    """
    chunk = prepare(inputs, dtype)
    v, ah, rh, bh, kh = chunk.v, chunk.ah, chunk.rh, chunk.bh, chunk.kh
    scaled, dscaled = state * chunk.mid, dend * chunk.rest
    u = removals(chunk, scaled)
    du = dot(chunk.arb.mT, dy, dtype) + dot(bh, dscaled.mT, dtype)
    z = dot(chunk.inverse.mT, du, dtype)
    dv = dot(chunk.ark.mT, dy, dtype) + dot(chunk.aak.mT, z, dtype) + dot(kh, dscaled.mT, dtype)
    dab, dak = lower(dot(z, u.mT, dtype), -1), lower(dot(z, v.mT, dtype), -1)
    drb, drk = lower(dot(dy, u.mT, dtype)), lower(dot(dy, v.mT, dtype))
    dr_inside, dr_start = dot(drb, bh, dtype) + dot(drk, kh, dtype), dot(dy, scaled, dtype)
    da_inside, da_start = dot(dab, bh, dtype) + dot(dak, kh, dtype), dot(z, scaled, dtype)
    db_inside = dot(dab.mT, ah, dtype) + dot(drb.mT, rh, dtype)
    dk_inside = dot(dak.mT, ah, dtype) + dot(drk.mT, rh, dtype)
    db_end, dk_end = dot(u, dscaled, dtype), dot(v, dscaled, dtype)
    # The decay's gradient: what a token's decay touches inside the chunk reaches it from behind,
    # what it touches of the end state from before it; written so, the two never cancel. Inside, a
    # pair of tokens adds the same number behind one and takes it off behind the other: all of it
    # where the two are one token. That holds only if the factors are those of the products, so
    # they are rounded alike; unrounded ones cost bfloat16 a digit wherever dy resembles v.
    near_r, near_a, near_b, near_k = (as_operand(x, dtype) for x in (rh, ah, bh, kh))
    removal = near_a * da_inside + ah * da_start
    inside = near_r * dr_inside + rh * dr_start + removal
    inside = inside - near_b * db_inside - near_k * dk_inside
    to_end = bh * db_end + kh * dk_end
    rows = inside.ndim - 2
    dlog_w = jax.lax.cumsum(inside, axis=rows, reverse=True) - removal
    dlog_w = dlog_w + jax.lax.cumsum(to_end, axis=rows) - to_end
    dlog_w = dlog_w + jnp.sum(scaled * dscaled, axis=-2, keepdims=True)
    dr, da = (dr_inside + dr_start) * chunk.upto, (da_inside + da_start) * chunk.before
    dk, db = (dk_inside + dk_end) * chunk.after, (db_inside + db_end) * chunk.after
    dstate = (dscaled + dot(dy.mT, rh, dtype) + dot(z.mT, ah, dtype)) * chunk.mid
    return (dr, dlog_w, dk, dv, da, db), dstate
