"""The arithmetic of one chunk of L tokens, forward and backward, on plain arrays.

Let cs be the running sum of log_w inside the chunk, mid its value at the chunk's middle, and last
its value at the end. With the factors

    ah = a exp(cs_{t-1} - mid)          rh = r exp(cs_t - mid)
    bh = b exp(mid - cs_t)              kh = k exp(mid - cs_t)

and the scaled states S^ = S exp(mid) before the chunk and S_end = S^_end exp(last - mid) after it,
the recurrence becomes matrix products:

    U      = T (ah S^ + Aak V)          T = (I - Aab)^-1, Aab = strictly_lower(ah bh'), Aak alike
    Y      = rh S^ + Arb U + Ark V      Arb = lower(rh bh'), Ark = lower(rh kh')
    S^_end = S^ + bh' U + kh' V

The gradients are, with G^ = dS_end exp(last - mid):

    Z      = T' (Arb' dY + bh G^)
    dS^    = G^ + rh' dY + ah' Z        dS = dS^ exp(mid)

States have keys as rows here, transposed from the op's: a GPU kernel's walk then needs b and k, or
r and a, in one orientation only.

Centring at the middle halves the exponents: log_w is above -0.6066, so with L = 64 all factors lie
between e^-20 and e^20. Nothing is divided by the decay. The arrays may have any leading axes
(batch, heads). Without leading axes the functions also run inside a GPU kernel, since they use
neither slices nor cumulative sums. `tpu.packed_chunk_math` restates them for the TPU's layout.

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
    """The operand dtype, exponential and precision of products, which depend on the device.

    Attributes:
        dtype: of the operands of matrix products, which accumulate in float32 or better.
        exp: the exponential function to some base.
        unit: converts natural logarithms to that base: 1 for exp, log2(e) for exp2.
        precision: of products whose operands are not bfloat16.
    """

    dtype: jnp.dtype
    exp: Callable[[Array], Array] = jnp.exp
    unit: float = 1.0
    precision: jax.lax.PrecisionLike = "highest"


class Chunk(NamedTuple):
    """The part of a chunk that depends neither on the state nor on k and v.

    Attributes:
        ah: see the module's docstring.
        rh: see the module's docstring.
        bh: see the module's docstring.
        before: exp(cs_{t-1} - mid).
        upto: exp(cs_t - mid).
        after: exp(mid - cs_t).
        mid: exp(mid).
        rest: exp(last - mid).
        arithmetic: for products and exponentials.
    """

    ah: Keys
    rh: Keys
    bh: Keys
    before: Keys
    upto: Keys
    after: Keys
    mid: Column
    rest: Column
    arithmetic: Arithmetic


class ReadProducts(NamedTuple):
    """The products through which tokens read the removals of other tokens: T and Arb."""

    inverse: Square
    arb: Square

    @property
    def transposed(self) -> "ReadProducts":
        """Returns both transposed, as `transposed_read_products` computes them."""
        return ReadProducts(self.inverse.mT, self.arb.mT)


class WriteProducts(NamedTuple):
    """What a chunk's tokens write, and the products through which tokens read it."""

    kh: Keys
    v: Values
    aak: Square
    ark: Square


def dot(
    x: Array,
    y: Array,
    arithmetic: Arithmetic,
    *,
    left: int = 1,
    right: int = 0,
) -> Array:
    """Multiplies matrices over axis `left` of x and axis `right` of y."""
    x = x.astype(arithmetic.dtype)
    y = y.astype(arithmetic.dtype)
    x = x if left else x.mT
    y = y.mT if right else y
    if jnp.dtype(arithmetic.dtype).itemsize == 2:
        return jnp.matmul(x, y, preferred_element_type=jnp.float32)
    return jnp.matmul(x, y, precision=arithmetic.precision)


def widen(x: Array) -> Array:
    """Converts bfloat16 to float32 bitwise: XLA may drop a cast to bfloat16 and back."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)


def rounded(x: Array, arithmetic: Arithmetic) -> Array:
    """Rounds x as an operand of a product is rounded, and keeps its dtype."""
    if arithmetic.dtype == jnp.bfloat16:
        return widen(x.astype(arithmetic.dtype))
    return x


def indices(side: int) -> tuple[Array, Array]:
    """Returns the row and the column of each entry of a square."""
    row = jax.lax.broadcasted_iota(jnp.int32, (side, side), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (side, side), 1)
    return row, column


def sums(signs: Array, x: Keys, arithmetic: Arithmetic) -> Keys:
    """Computes signs [L L] @ x for signs of -1, 0 and 1.

    With bfloat16 operands x is split into two of them, which keeps 16 bits of it.
    """
    # The signs are exact in bfloat16, so only x is rounded.
    signs = signs.astype(arithmetic.dtype)
    high = x.astype(arithmetic.dtype)
    total = dot(signs, high, arithmetic)
    if arithmetic.dtype == jnp.bfloat16:
        total = total + dot(signs, x - widen(high), arithmetic)
    return total


def lower(x: Square, offset: int = 0) -> Square:
    """Zeroes the entries of `x` above its diagonal; with `offset` -1 the diagonal as well."""
    row, column = indices(x.shape[-1])
    # A select instead of a product with a mask: the masked entries may be infinite.
    return jnp.where(row + offset >= column, x, 0)


def unit_inverse(a: Square, arithmetic: Arithmetic, *, upper: bool = False) -> Square:
    """Computes (I - a)^-1 from the entries of `a` below its diagonal, or above it.

    Pairs of inverted diagonal blocks are merged until one is left, so every intermediate value is
    the inverse of a block. The Neumann product (I + a)(I + a^2)... overflows on repeated keys at
    L = 64.

    Args:
        a: its side is a power of two.
        arithmetic: for products.
        upper: whether to use the entries above the diagonal.
    """
    row, column = indices(a.shape[-1])
    if upper:
        row, column = column, row
    inverse = jnp.where(row == column, jnp.ones_like(a), 0)
    block = 1
    # log2(L) levels. After each, `inverse` holds the inverses of diagonal blocks of twice the rows.
    while block < a.shape[-1]:
        # The off-diagonal quarter of each pair of blocks, from bits, which are cheaper than
        # divisions.
        merged = (row ^ column < 2 * block) & (row & block != 0) & (column & block == 0)
        part = jnp.where(merged, a, 0)
        # The inverse of a block of one row is 1.
        if block > 1:
            part = dot(inverse, dot(part, inverse, arithmetic), arithmetic)
        inverse = inverse + part
        block = 2 * block
    return inverse


def prepare(
    r: Keys,
    log_w: Keys,
    a: Keys,
    b: Keys,
    halves: tuple[Column, Column],
    arithmetic: Arithmetic,
) -> Chunk:
    """Computes the factors of a chunk's tokens, all in float32 or better.

    Args:
        r: receptance.
        log_w: natural logarithm of the decay.
        a: removal key.
        b: removal key times rate.
        halves: the sums of log_w over the chunk's two halves.
        arithmetic: for products and exponentials.
    """
    row, column = indices(r.shape[-2])
    # One product computes the running sum minus the sum over the first half.
    signs = (column <= row).astype(jnp.int32) - (column < r.shape[-2] // 2).astype(
        jnp.int32
    )
    log_w = log_w * arithmetic.unit
    # cs_t - mid in units of the exponential, [L Nk].
    centred = sums(signs, log_w, arithmetic)
    # cs_{t-1} is cs_t minus the token's own log_w.
    before = arithmetic.exp(centred - log_w)
    upto = arithmetic.exp(centred)
    after = arithmetic.exp(-centred)
    first_half, second_half = halves
    mid = arithmetic.exp(first_half * arithmetic.unit)
    rest = arithmetic.exp(second_half * arithmetic.unit)
    return Chunk(
        ah=a * before,
        rh=r * upto,
        bh=b * after,
        before=before,
        upto=upto,
        after=after,
        mid=mid,
        rest=rest,
        arithmetic=arithmetic,
    )


def read_products(chunk: Chunk) -> ReadProducts:
    """Computes T and Arb."""
    arithmetic = chunk.arithmetic
    aab = dot(chunk.ah, chunk.bh, arithmetic, right=1)
    inverse = unit_inverse(aab, arithmetic)
    return ReadProducts(inverse, lower(dot(chunk.rh, chunk.bh, arithmetic, right=1)))


def transposed_read_products(chunk: Chunk) -> ReadProducts:
    """Computes T and Arb transposed, from products with a and r in the other orientation."""
    arithmetic = chunk.arithmetic
    aab = dot(chunk.bh, chunk.ah, arithmetic, right=1)
    inverse = unit_inverse(aab, arithmetic, upper=True)
    arb = dot(chunk.bh, chunk.rh, arithmetic, right=1)
    row, column = indices(arb.shape[-1])
    return ReadProducts(inverse, jnp.where(row <= column, arb, 0))


def write_products(chunk: Chunk, k: Keys, v: Values) -> WriteProducts:
    """Computes what a chunk's keys and values write."""
    # Decays to the chunk's middle: below 1 in the first half, above 1 in the second.
    kh = k * chunk.after
    aak = dot(chunk.ah, kh, chunk.arithmetic, right=1)
    ark = dot(chunk.rh, kh, chunk.arithmetic, right=1)
    return WriteProducts(
        kh=kh,
        v=v,
        aak=lower(aak, -1),
        ark=lower(ark),
    )


def removals(
    chunk: Chunk, inverse: Square, written: WriteProducts, start: Matrix
) -> Values:
    """Computes U, what each token removes from the state's rows, from S^."""
    arithmetic = chunk.arithmetic
    read = dot(chunk.ah, start, arithmetic) + dot(written.aak, written.v, arithmetic)
    return dot(inverse, read, arithmetic)


def forward(
    chunk: Chunk, written: WriteProducts, start: Matrix
) -> tuple[Values, Matrix]:
    """Computes what the chunk's tokens read, and S^_end, from S^."""
    arithmetic = chunk.arithmetic
    inverse, arb = read_products(chunk)
    # [L Nv]: row t is what token t's removal key reads from the state before it.
    u = removals(chunk, inverse, written, start)
    y = dot(chunk.rh, start, arithmetic) + dot(arb, u, arithmetic)
    y = y + dot(written.ark, written.v, arithmetic)
    # The state is added last: Triton miscompiles two products that are chained into one
    # loop-carried accumulator for some GPUs (triton-lang/triton#10821).
    change = dot(chunk.bh, u, arithmetic, left=0)
    change = change + dot(written.kh, written.v, arithmetic, left=0)
    return y, start + change


def removal_gradients(
    chunk: Chunk, transposed: ReadProducts, dy: Values, dend: Matrix
) -> Values:
    """Computes Z, the gradients of what each token's removal reads, from G^."""
    arithmetic = chunk.arithmetic
    # The gradient of U: through the reads of its own and later tokens, and through the end state.
    du = dot(transposed.arb, dy, arithmetic) + dot(chunk.bh, dend, arithmetic)
    return dot(transposed.inverse, du, arithmetic)


def state_gradient(chunk: Chunk, z: Values, dy: Values, dend: Matrix) -> Matrix:
    """Computes dS^ from Z and G^."""
    arithmetic = chunk.arithmetic
    # The carried gradient is added last, as in `forward`.
    change = dot(chunk.rh, dy, arithmetic, left=0)
    return dend + (change + dot(chunk.ah, z, arithmetic, left=0))


def gradients(
    chunk: Chunk,
    written: WriteProducts,
    u: Values,
    z: Values,
    states: tuple[Matrix, Matrix],
    dy: Values,
) -> Iterator[tuple[str, Array]]:
    """Yields the gradients of the six inputs by name, each as soon as it is computed.

    A kernel that stores each one immediately needs fewer registers.

    Args:
        chunk: from `prepare`.
        written: from `write_products`.
        u: from `removals`.
        z: from `removal_gradients`.
        states: S^ and G^.
        dy: gradient of y.
    """
    arithmetic = chunk.arithmetic
    start, dend = states
    kh, v, aak, ark = written
    ah = chunk.ah
    rh = chunk.rh
    bh = chunk.bh

    def times(x, y):
        return dot(x, y, arithmetic)

    def times_transposed(x, y):
        return dot(x, y, arithmetic, right=1)

    def transposed_times(x, y):
        return dot(x, y, arithmetic, left=0)

    # [1 Nk]: the log_w of every token scales what the end state keeps of the start state.
    ends = jnp.sum(
        start.astype(ah.dtype) * dend.astype(ah.dtype), axis=-1, keepdims=True
    ).mT
    yield "v", transposed_times(ark, dy) + transposed_times(aak, z) + times(kh, dend)
    # Gradients of Arb, Ark, Aab and Aak, [L L], with the masks of the forward pass.
    drb = lower(times_transposed(dy, u))
    drk = lower(times_transposed(dy, v))
    dr = times(drb, bh) + times(drk, kh) + times_transposed(dy, start)
    yield "r", dr * chunk.upto
    dab = lower(times_transposed(z, u), -1)
    dak = lower(times_transposed(z, v), -1)
    da = times(dab, bh) + times(dak, kh) + times_transposed(z, start)
    yield "a", da * chunk.before
    db = transposed_times(dab, ah) + transposed_times(drb, rh)
    db_end = times_transposed(u, dend)
    yield "b", (db + db_end) * chunk.after
    # The decay's gradient. log_w_t scales everything that is written before token t and read at t
    # or later. Inside the chunk this is what tokens from t on read, minus the part that tokens from
    # t on wrote. A pair of tokens from t on is thus added by its reader and subtracted by its
    # writer. The two cancel exactly only if both use the rounded factors of the products; unrounded
    # factors cost bfloat16 a digit wherever dy resembles v. The end state holds what tokens before
    # t write: this is summed separately, since a difference would cancel. A removal reads the state
    # before its own token's decay, hence `- removal`.
    rounded_r = rounded(rh, arithmetic)
    rounded_a = rounded(ah, arithmetic)
    rounded_b = rounded(bh, arithmetic)
    rounded_k = rounded(kh, arithmetic)
    removal = rounded_a * da
    inside = rounded_r * dr + removal - rounded_b * db
    to_end = rounded_b * db_end
    dk = transposed_times(dak, ah) + transposed_times(drk, rh)
    dk_end = times_transposed(v, dend)
    yield "k", (dk + dk_end) * chunk.after
    inside = inside - rounded_k * dk
    to_end = to_end + rounded_k * dk_end
    row, column = indices(dr.shape[-2])
    dlog_w = sums(column >= row, inside, arithmetic) - removal + ends
    yield "log_w", dlog_w + sums(column < row, to_end, arithmetic)
