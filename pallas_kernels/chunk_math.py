"""The arithmetic of one chunk of L tokens, forward and backward, on plain arrays.

With cs the running sum of log_w inside the chunk and mid its value at the chunk's middle, the
factors

    ah = a exp(cs_{t-1} - mid)          rh = r exp(cs_t - mid)
    bh = b exp(mid - cs_t)              kh = k exp(mid - cs_t)

and the scaled states S^ = S exp(mid), before the chunk, and S_end = S^_end exp(last - mid), behind
it, turn the recurrence into matrix products:

    U      = T (ah S^ + Aak V)          T = (I - Aab)^-1, Aab = strictly_lower(ah bh'), Aak alike
    Y      = rh S^ + Arb U + Ark V      Arb = lower(rh bh'), Ark = lower(rh kh')
    S^_end = S^ + bh' U + kh' V

and likewise the gradients, with G^ = dS_end exp(last - mid):

    Z      = T' (Arb' dY + bh G^)
    dS^    = G^ + rh' dY + ah' Z        dS = dS^ exp(mid)

States lie here with keys as rows, the other way round than outside: then a GPU kernel's walk needs
b and k, or r and a, in one orientation alone.

Centring at the middle halves the exponents: log_w is above -0.6066, so with L = 64 no factor leaves
e^(+-20). Nothing is divided by the decay. The arrays may carry any leading axes (batch, heads).
Without any, all of it also runs inside a GPU kernel: there are no slices and no cumulative sums.

Source: the WY form of generalised delta rules (DPLR), with the state scaled once per chunk.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Keys = Float[Array, "... L Nk"]
Values = Float[Array, "... L Nv"]
Column = Float[Array, "... Nk 1"]
Square = Float[Array, "... L L"]
Matrix = Float[Array, "... Nk Nv"]


class Arithmetic(NamedTuple):
    """What differs between machines.

    Attributes:
        dtype: of the operands of matrix products; their sums are float32 or better.
        exp: the exponential of a logarithm in these units.
        unit: what makes natural logarithms such ones.
    """

    dtype: jnp.dtype
    exp: Callable[[Array], Array] = jnp.exp
    unit: float = 1.0


class Chunk(NamedTuple):
    """What a chunk's tokens determine without a state, and without what they write."""

    ah: Keys
    rh: Keys
    bh: Keys
    before: Keys  # exp(cs_{t-1} - mid)
    upto: Keys  # exp(cs_t - mid)
    after: Keys  # exp(mid - cs_t)
    mid: Column  # exp(mid)
    rest: Column  # exp(last - mid)
    how: Arithmetic


class Read(NamedTuple):
    """What reading tokens meet of removals."""

    inverse: Square  # T
    arb: Square

    @property
    def transposed(self) -> "Read":
        """As `read_backwards` has them."""
        return Read(self.inverse.mT, self.arb.mT)


class Written(NamedTuple):
    """What a chunk's tokens write."""

    kh: Keys
    v: Values
    aak: Square
    ark: Square


def dot(x: Array, y: Array, how: Arithmetic, *, left: int = 1, right: int = 0) -> Array:
    """The product over axis `left` of x's matrices and `right` of y's."""
    x, y = (z.astype(how.dtype) for z in (x, y))
    x, y = x if left else x.mT, y.mT if right else y
    if how.dtype == jnp.bfloat16:
        return jnp.matmul(x, y, preferred_element_type=jnp.float32)
    return jnp.matmul(x, y, precision="highest")


def widen(x: Array) -> Array:
    """bfloat16 as float32, by its bits: XLA may drop a cast there and back."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)


def rounded(x: Array, how: Arithmetic) -> Array:
    """x with the digits that it has as an operand, in its own dtype."""
    return widen(x.astype(how.dtype)) if how.dtype == jnp.bfloat16 else x


def indices(side: int) -> tuple[Array, Array]:
    """Row and column of each entry of a square."""
    shape = (side, side)
    return tuple(jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


def sums(signs: Array, x: Keys, how: Arithmetic) -> Keys:
    """signs [L L] @ x, for signs of -1, 0 and 1; beside bfloat16 operands, 16 bits of x count."""
    signs, high = signs.astype(how.dtype), x.astype(how.dtype)
    found = dot(signs, high, how)
    return found + dot(signs, x - widen(high), how) if how.dtype == jnp.bfloat16 else found


def lower(x: Square, offset: int = 0) -> Square:
    """`x` with what lies above its diagonal zeroed; `offset` -1 zeroes the diagonal as well.

    A select, not a product with a mask: the masked entries may be large.
    """
    row, column = indices(x.shape[-1])
    return jnp.where(row + offset >= column, x, 0)


def unit_inverse(a: Square, how: Arithmetic, *, upper: bool = False) -> Square:
    """(I - a)^-1 of what lies below the diagonal of `a`, or above it; its side is a power of two.

    Pairs of solved diagonal blocks are merged until one is left, so that only true inverses of
    sub-blocks appear. The Neumann product (I + a)(I + a^2)... overflows on repeated keys at L = 64.
    """
    row, column = indices(a.shape[-1])[:: -1 if upper else 1]
    inverse, block = jnp.where(row == column, jnp.ones_like(a), 0), 1
    while block < a.shape[-1]:
        # By bits, which are cheaper than quotients: the outer quarter of each pair of blocks.
        merged = (row ^ column < 2 * block) & (row & block != 0) & (column & block == 0)
        part = jnp.where(merged, a, 0)
        if block > 1:
            part = dot(inverse, dot(part, inverse, how), how)
        inverse, block = inverse + part, 2 * block
    return inverse


def prepare(
    r: Keys, log_w: Keys, a: Keys, b: Keys, halves: tuple[Column, Column], how: Arithmetic
) -> Chunk:
    """The factors and products of a chunk's tokens, all float32 or better.

    Args:
        r: receptance.
        log_w: natural logarithm of the decay.
        a: removal key.
        b: removal key times rate.
        halves: the sums of log_w over the chunk's two halves.
        how: for products and exponentials.
    """
    row, column = indices(r.shape[-2])
    signs = (column <= row).astype(jnp.int32) - (column < r.shape[-2] // 2).astype(jnp.int32)
    log_w = log_w * how.unit
    centred = sums(signs, log_w, how)
    exp_before, exp_upto, exp_after = how.exp(centred - log_w), how.exp(centred), how.exp(-centred)
    mid, rest = (how.exp(half * how.unit) for half in halves)
    ah, rh, bh = a * exp_before, r * exp_upto, b * exp_after
    return Chunk(
        ah=ah,
        rh=rh,
        bh=bh,
        before=exp_before,
        upto=exp_upto,
        after=exp_after,
        mid=mid,
        rest=rest,
        how=how,
    )


def read(chunk: Chunk) -> Read:
    """T and Arb."""
    how = chunk.how
    inverse = unit_inverse(dot(chunk.ah, chunk.bh, how, right=1), how)
    return Read(inverse, lower(dot(chunk.rh, chunk.bh, how, right=1)))


def read_backwards(chunk: Chunk) -> Read:
    """T and Arb transposed, from products that need a and r in the walk's other orientation."""
    how = chunk.how
    inverse = unit_inverse(dot(chunk.bh, chunk.ah, how, right=1), how, upper=True)
    arb = dot(chunk.bh, chunk.rh, how, right=1)
    row, column = indices(arb.shape[-1])
    return Read(inverse, jnp.where(row <= column, arb, 0))


def write(chunk: Chunk, k: Keys, v: Values) -> Written:
    """What keys and values add to a chunk."""
    how, kh = chunk.how, k * chunk.after
    aak, ark = dot(chunk.ah, kh, how, right=1), dot(chunk.rh, kh, how, right=1)
    return Written(kh=kh, v=v, aak=lower(aak, -1), ark=lower(ark))


def removals(chunk: Chunk, inverse: Square, written: Written, start: Matrix) -> Values:
    """U: what each token removes from the state's rows, given S^."""
    how = chunk.how
    return dot(inverse, dot(chunk.ah, start, how) + dot(written.aak, written.v, how), how)


def forward(chunk: Chunk, written: Written, start: Matrix) -> tuple[Values, Matrix]:
    """What the chunk's tokens read, and S^_end behind them, given S^."""
    how, (kh, v, _, ark), (inverse, arb) = chunk.how, written, read(chunk)
    u = removals(chunk, inverse, written, start)
    y = dot(chunk.rh, start, how) + dot(arb, u, how) + dot(ark, v, how)
    return y, start + dot(chunk.bh, u, how, left=0) + dot(kh, v, how, left=0)


def removal_gradients(chunk: Chunk, backwards: Read, dy: Values, dend: Matrix) -> Values:
    """Z: the gradients of what each token's removal reads, given G^."""
    how = chunk.how
    return dot(backwards.inverse, dot(backwards.arb, dy, how) + dot(chunk.bh, dend, how), how)


def state_gradient(chunk: Chunk, z: Values, dy: Values, dend: Matrix) -> Matrix:
    """dS^, given Z and G^."""
    how = chunk.how
    return dend + dot(chunk.rh, dy, how, left=0) + dot(chunk.ah, z, how, left=0)


def gradients(
    chunk: Chunk, written: Written, u: Values, z: Values, states: tuple[Matrix, Matrix], dy: Values
) -> Iterator[tuple[str, Array]]:
    """Gradients of the six inputs by name, each as soon as it is there.

    Args:
        chunk: from `prepare`.
        written: from `write`.
        u: from `removals`.
        z: from `removal_gradients`.
        states: S^ and G^.
        dy: gradient of what was read.
    """
    how, (start, dend), (kh, v, aak, ark) = chunk.how, states, written
    ah, rh, bh = chunk.ah, chunk.rh, chunk.bh
    ends = jnp.sum(start.astype(ah.dtype) * dend.astype(ah.dtype), axis=-1, keepdims=True).mT
    dv = dot(ark, dy, how, left=0) + dot(aak, z, how, left=0) + dot(kh, dend, how)
    yield "v", dv
    rb, rk = lower(dot(dy, u, how, right=1)), lower(dot(dy, v, how, right=1))
    dr = dot(rb, bh, how) + dot(rk, kh, how) + dot(dy, start, how, right=1)
    yield "r", dr * chunk.upto
    ab, ak = lower(dot(z, u, how, right=1), -1), lower(dot(z, v, how, right=1), -1)
    da = dot(ab, bh, how) + dot(ak, kh, how) + dot(z, start, how, right=1)
    yield "a", da * chunk.before
    db, db_end = dot(ab, ah, how, left=0) + dot(rb, rh, how, left=0), dot(u, dend, how, right=1)
    yield "b", (db + db_end) * chunk.after
    # The decay's gradient: what a token's decay touches inside the chunk reaches it from behind,
    # what it touches of the end state from before it; written so, the two never cancel. Inside, a
    # pair of tokens adds the same number behind one and takes it off behind the other: all of it
    # where the two are one token. That holds only if the factors are those of the products, so
    # they are rounded alike; unrounded ones cost bfloat16 a digit wherever dy resembles v.
    near_r, near_a, near_b, near_k = (rounded(x, how) for x in (rh, ah, bh, kh))
    removal = near_a * da
    inside, to_end = near_r * dr + removal - near_b * db, near_b * db_end
    dk, dk_end = dot(ak, ah, how, left=0) + dot(rk, rh, how, left=0), dot(v, dend, how, right=1)
    yield "k", (dk + dk_end) * chunk.after
    inside, to_end = inside - near_k * dk, to_end + near_k * dk_end
    row, column = indices(dr.shape[-2])
    dlog_w = sums(column >= row, inside, how) - removal + ends
    yield "log_w", dlog_w + sums(column < row, to_end, how)
