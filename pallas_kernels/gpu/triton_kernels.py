"""WKV-7 for NVIDIA GPUs, as three Triton kernels on arrays [B T H N] in their memory layout.

The mathematics is that of `chunk_math`, with two changes that save instructions:

* The loops carry the scaled state S^ = S exp(mid) and, backward, the scaled gradient
  G^ = dS exp(last - mid), so each is scaled once per chunk. The products read them, so they are
  saved in the tokens' dtype.
* Sums over tokens are products with matrices of zeros and ones.

`forward` and `state_gradient` loop over the chunks, with one program per head and block of value
rows; `gradients` has one program per chunk and head. Products take bfloat16 operands for bfloat16
tokens, and are IEEE float32 products for float32 tokens. Head sizes are powers of two from 16 on,
and all chunks are full. Heads are the grid's first axis, the only one that may have more than
65,535 programs.

The order of the statements is tuned: it determines how many registers are live at a time.
`python -m pallas_kernels.compile_checks gpu` counts them.
"""

import os

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _exp2(x):
    """Computes 2^x without the instructions that keep subnormal results."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _dot(x, y, acc=None):
    """Computes x @ y + acc in float32, with both operands in x's dtype."""
    return tl.dot(x, y.to(x.dtype), acc=acc, input_precision="ieee")


@triton.jit
def _sums(chosen, x, DTYPE: tl.constexpr):
    """Computes chosen @ x for a float32 x and a matrix of -1, 0 and 1.

    With bfloat16 operands x is split into two of them, which keeps 16 bits of it.
    """
    if DTYPE == tl.float32:
        return _dot(chosen.to(tl.float32), x)
    chosen = chosen.to(tl.bfloat16)
    high = x.to(tl.bfloat16)
    return _dot(chosen, high, _dot(chosen, x - high.to(tl.float32)))


@triton.jit
def _times(pointer, offsets, factor, DTYPE: tl.constexpr):
    """Loads a tile of tokens and multiplies it by a float32 factor, as an operand."""
    return (tl.load(pointer + offsets).to(tl.float32) * factor).to(DTYPE)


@triton.jit
def _decays(log_w, offsets, CHUNK: tl.constexpr, DTYPE: tl.constexpr):
    """Computes exp(cs_{t-1} - mid), exp(cs_t - mid) and exp(mid - cs_t) of the tile's tokens."""
    row = tl.arange(0, CHUNK)[:, None]
    column = tl.arange(0, CHUNK)[None, :]
    x = tl.load(log_w + offsets) * LOG2E
    centred = tl.where(column <= row, 1.0, 0.0) - tl.where(
        column < CHUNK // 2, 1.0, 0.0
    )
    c = _sums(centred, x, DTYPE)
    return _exp2(c - x), _exp2(c), _exp2(-c)


@triton.jit
def _halves(log_w, key, stride, CHUNK: tl.constexpr):
    """Computes exp(mid) and exp(last - mid) of the chunk at `log_w`."""
    offsets = tl.arange(0, CHUNK // 2)[:, None] * stride + key
    middle = tl.sum(tl.load(log_w + offsets), 0)
    rest = tl.sum(tl.load(log_w + CHUNK // 2 * stride + offsets), 0)
    return _exp2(middle * LOG2E), _exp2(rest * LOG2E)


@triton.jit
def _lower(x, DTYPE: tl.constexpr):
    """Zeroes the entries above the diagonal, and casts to `DTYPE`."""
    row = tl.arange(0, x.shape[0])[:, None]
    column = tl.arange(0, x.shape[0])[None, :]
    return tl.where(row >= column, x, 0.0).to(DTYPE)


@triton.jit
def _below(x, DTYPE: tl.constexpr):
    """Zeroes the entries on and above the diagonal, and casts to `DTYPE`."""
    row = tl.arange(0, x.shape[0])[:, None]
    column = tl.arange(0, x.shape[0])[None, :]
    return tl.where(row > column, x, 0.0).to(DTYPE)


@triton.jit
def _merge(inverse, a, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Merges pairs of inverted diagonal blocks of `BLOCK` rows, in float32."""
    row = tl.arange(0, a.shape[0])[:, None]
    column = tl.arange(0, a.shape[0])[None, :]
    pair = row // (2 * BLOCK) == column // (2 * BLOCK)
    below = pair & (row // BLOCK % 2 == 1) & (column // BLOCK % 2 == 0)
    solved = inverse.to(DTYPE)
    return _dot(solved, _dot(tl.where(below, a, 0.0).to(DTYPE), solved), inverse)


@triton.jit
def _inverse(a, CHUNK: tl.constexpr, DTYPE: tl.constexpr):
    """Computes (I - a)^-1 from the entries below a's diagonal; see `chunk_math.unit_inverse`."""
    row = tl.arange(0, CHUNK)[:, None]
    column = tl.arange(0, CHUNK)[None, :]
    pair = (row // 2 == column // 2) & (row > column)
    # The inverse of a block of two rows has a itself below the diagonal.
    inverse = tl.where(row == column, 1.0, tl.where(pair, a, 0.0))
    # `static_range` needs constant bounds; these serve chunks up to 128.
    for level in tl.static_range(1, 7):
        if 2**level < CHUNK:
            inverse = _merge(inverse, a, 2**level, DTYPE)
    return inverse.to(DTYPE)


@triton.jit
def _is_idle(
    row, SEGMENTS: tl.constexpr, PROBED: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr
):  # fmt: skip
    """Restates `segmented_passes.Probes.is_idle`; `FIRST` is the segment that runs first."""
    segment = row % SEGMENTS
    beyond = tl.program_id(1) * BLOCK >= PROBED
    return (segment == SEGMENTS - 1 - FIRST) | ((segment == FIRST) & beyond)


@triton.jit
def forward(  # noqa: PLR0915
    r, log_w, k, v, a, b, state, tokens, heads, end, y, starts,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
    READ: tl.constexpr, SAVE: tl.constexpr, SEGMENTS: tl.constexpr, PROBED: tl.constexpr,
):  # fmt: skip
    """Writes the end state for `BLOCK` value rows of one head.

    With `READ` it also writes y, with `SAVE` the S^ of every chunk.
    """
    DTYPE: tl.constexpr = v.dtype.element_ty
    # 64 bits: offsets of large batches pass 2^31.
    head = tl.program_id(0).to(tl.int64)
    time = tl.arange(0, CHUNK)[:, None]
    key = tl.arange(0, KEYS)[None, :]
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Tokens of one head are `heads` vectors apart in [B T H N].
    by_key = time * heads * KEYS + key
    by_value = time * heads * VALUES + value[None, :]
    # States are [Nv Nk] in memory. Here, and in the saved states of chunks, keys are the rows: no
    # product is then transposed and rounded to become the left operand of another, which Triton
    # miscompiles for Hopper's warpgroup products (triton-lang/triton#6124).
    column = tl.arange(0, KEYS)[:, None]
    entry = value[None, :] * KEYS + column
    kept = column * VALUES + value[None, :]
    # The index of the head's first vector: `head` counts the heads of all rows of the batch.
    first = head // heads * tokens * heads + head % heads
    scaled = tl.load(state + head * VALUES * KEYS + entry)
    starts += head * tl.cdiv(tokens, CHUNK) * VALUES * KEYS
    rest = tl.full((KEYS, 1), 1.0, tl.float32)
    end_of_walk = tokens
    if SEGMENTS:
        if _is_idle(head // heads, SEGMENTS, PROBED, BLOCK, 0):
            end_of_walk = 0
    for start in range(0, end_of_walk, CHUNK):
        at = (first + start * heads) * KEYS
        to = (first + start * heads) * VALUES
        before, upto, after = _decays(log_w + at, by_key, CHUNK, DTYPE)
        ah = _times(a + at, by_key, before, DTYPE)
        rh = _times(r + at, by_key, upto, DTYPE)
        bh = _times(b + at, by_key, after, DTYPE)
        kh = _times(k + at, by_key, after, DTYPE)
        vs = tl.load(v + to + by_value)
        inverse = _inverse(_dot(ah, bh.T), CHUNK, DTYPE)
        aak = _below(_dot(ah, kh.T), DTYPE)
        ark = _lower(_dot(rh, kh.T), DTYPE)
        arb = _lower(_dot(rh, bh.T), DTYPE)
        # Loading log_w again is cheaper than summing halves of a tile.
        middle, next_rest = _halves(log_w + at, key, heads * KEYS, CHUNK)
        # Scales the state once, by the previous chunk's rest and this one's mid.
        scaled *= rest * middle[:, None]
        # Rounded once for all products that read the state; the state itself stays float32.
        operand = scaled.to(DTYPE)
        u = _dot(inverse, _dot(aak, vs, _dot(ah, operand))).to(DTYPE)
        if READ:
            ys = _dot(ark, vs, _dot(arb, u, _dot(rh, operand)))
            tl.store(y + to + by_value, ys)
        if SAVE:
            tl.store(starts + start // CHUNK * VALUES * KEYS + kept, operand)
        # The state is added last: Triton miscompiles these two products for newer GPUs if they are
        # chained into one loop-carried accumulator (triton-lang/triton#10821).
        scaled += _dot(bh.T, u) + _dot(kh.T, vs)
        rest = next_rest[:, None]
    tl.store(end + head * VALUES * KEYS + entry, scaled * rest)


@triton.jit
def state_gradient(
    r, log_w, a, b, dy, dend, tokens, heads, dstate, ends,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
    SAVE: tl.constexpr, SEGMENTS: tl.constexpr, PROBED: tl.constexpr,
):  # fmt: skip
    """Writes the start state's gradient for `BLOCK` value rows of one head.

    With `SAVE` it also writes the G^ of every chunk.
    """
    DTYPE: tl.constexpr = dy.dtype.element_ty
    # 64 bits: offsets of large batches pass 2^31.
    head = tl.program_id(0).to(tl.int64)
    time = tl.arange(0, CHUNK)[:, None]
    key = tl.arange(0, KEYS)[None, :]
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    by_key = time * heads * KEYS + key
    by_value = time * heads * VALUES + value[None, :]
    # Keys are the rows, as in `forward`.
    column = tl.arange(0, KEYS)[:, None]
    entry = value[None, :] * KEYS + column
    kept = column * VALUES + value[None, :]
    first = head // heads * tokens * heads + head % heads
    scaled = tl.load(dend + head * VALUES * KEYS + entry)
    chunks = tl.cdiv(tokens, CHUNK)
    ends += head * chunks * VALUES * KEYS
    middle = tl.full((KEYS, 1), 1.0, tl.float32)
    end_of_walk = chunks
    if SEGMENTS:
        if _is_idle(head // heads, SEGMENTS, PROBED, BLOCK, SEGMENTS - 1):
            end_of_walk = 0
    for done in range(0, end_of_walk):
        chunk = chunks - 1 - done
        start = chunk * CHUNK
        at = (first + start * heads) * KEYS
        before, upto, after = _decays(log_w + at, by_key, CHUNK, DTYPE)
        ah = _times(a + at, by_key, before, DTYPE)
        rh = _times(r + at, by_key, upto, DTYPE)
        bh = _times(b + at, by_key, after, DTYPE)
        dys = tl.load(dy + (first + start * heads) * VALUES + by_value)
        inverse = _inverse(_dot(ah, bh.T), CHUNK, DTYPE)
        arb = _lower(_dot(rh, bh.T), DTYPE)
        next_middle, rest = _halves(log_w + at, key, heads * KEYS, CHUNK)
        scaled *= middle * rest[:, None]
        operand = scaled.to(DTYPE)
        if SAVE:
            tl.store(ends + chunk * VALUES * KEYS + kept, operand)
        z = _dot(inverse.T, _dot(arb.T, dys, _dot(bh, operand))).to(DTYPE)
        scaled += _dot(rh.T, dys) + _dot(ah.T, z)
        middle = next_middle[:, None]
    tl.store(dstate + head * VALUES * KEYS + entry, scaled * middle)


@triton.jit
def gradients(  # noqa: PLR0915
    r, log_w, k, v, a, b, dy, starts, ends, tokens, heads, dr, dlog_w, dk, dv, da, db,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of one chunk's tokens of one head, from the chunk's S^ and G^.

    "near" comes from tokens of the chunk, "far" from its end state. The decay's gradient uses the
    factors rounded as in the products: see `chunk_math.gradients`.
    """
    DTYPE: tl.constexpr = v.dtype.element_ty
    start = tl.program_id(1) * CHUNK
    head = tl.program_id(0).to(tl.int64)
    time = tl.arange(0, CHUNK)[:, None]
    key = tl.arange(0, KEYS)[None, :]
    value = tl.arange(0, VALUES)[None, :]
    first = (head // heads * tokens + start) * heads + head % heads
    by_key = first * KEYS + time * heads * KEYS + key
    by_value = first * VALUES + time * heads * VALUES + value
    # [Nk Nv], as the other kernels save them.
    entry = tl.arange(0, KEYS)[:, None] * VALUES + value
    entry += (head * tl.cdiv(tokens, CHUNK) + tl.program_id(1)) * VALUES * KEYS
    s = tl.load(starts + entry)
    g = tl.load(ends + entry)
    start_to_end = tl.sum(s.to(tl.float32) * g.to(tl.float32), 1)
    before, upto, after = _decays(log_w, by_key, CHUNK, DTYPE)
    ah = _times(a, by_key, before, DTYPE)
    rh = _times(r, by_key, upto, DTYPE)
    bh = _times(b, by_key, after, DTYPE)
    kh = _times(k, by_key, after, DTYPE)
    vs = tl.load(v + by_value)
    dys = tl.load(dy + by_value)
    inverse = _inverse(_dot(ah, bh.T), CHUNK, DTYPE)
    aak = _below(_dot(ah, kh.T), DTYPE)
    arb = _lower(_dot(rh, bh.T), DTYPE)
    u = _dot(inverse, _dot(aak, vs, _dot(ah, s))).to(DTYPE)
    z = _dot(inverse.T, _dot(arb.T, dys, _dot(bh, g))).to(DTYPE)
    ark = _lower(_dot(rh, kh.T), DTYPE)
    tl.store(dv + by_value, _dot(ark.T, dys, _dot(aak.T, z, _dot(kh, g))))
    drb = _lower(_dot(dys, u.T), DTYPE)
    drk = _lower(_dot(dys, vs.T), DTYPE)
    near = _dot(drk, kh, _dot(drb, bh, _dot(dys, s.T)))
    tl.store(dr + by_key, near * upto)
    inside = rh.to(tl.float32) * near
    dab = _below(_dot(z, u.T), DTYPE)
    dak = _below(_dot(z, vs.T), DTYPE)
    near = _dot(dak, kh, _dot(dab, bh, _dot(z, s.T)))
    tl.store(da + by_key, near * before)
    removal = ah.to(tl.float32) * near
    near = _dot(drb.T, rh, _dot(dab.T, ah))
    far = _dot(u, g.T)
    tl.store(db + by_key, (near + far) * after)
    inside += removal - bh.to(tl.float32) * near
    to_end = bh.to(tl.float32) * far
    near = _dot(drk.T, rh, _dot(dak.T, ah))
    far = _dot(vs, g.T)
    tl.store(dk + by_key, (near + far) * after)
    inside -= kh.to(tl.float32) * near
    to_end += kh.to(tl.float32) * far
    row = time
    column = tl.arange(0, CHUNK)[None, :]
    change = _sums(tl.where(column >= row, 1.0, 0.0), inside, DTYPE) - removal
    change += (
        _sums(tl.where(column < row, 1.0, 0.0), to_end, DTYPE) + start_to_end[None, :]
    )
    tl.store(dlog_w + by_key, change)
