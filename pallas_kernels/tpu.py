"""WKV-7 on TPU: one Pallas kernel forward and one backward, a chunk of tokens a grid step. Level 0.

Arrays stay [B, T, H*N]. Small heads share a tile: with two heads of 64, a token's lanes are those
of both, the rows of the two heads are stacked one above the other with the other head's lanes
zeroed, and the state is block diagonal, so that every product is a full tile and heads never mix.
Some groups of heads go through a grid step together, stage by stage: one group's products fill the
time in which another's results are on their way. The arithmetic is that of `chunk_math`.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .reference import Inputs, State

LANES = 128
# States at the start of every chunk: rows are values, columns the keys of all heads of a tile.
Starts = Float[Array, "B G C Nv W"]


class Form(NamedTuple):
    """Sizes of one kernel; `heads` share a tile, `groups` of tiles a grid step."""

    chunk: int
    heads: int
    keys: int
    values: int
    groups: int
    dtype: jnp.dtype

    @property
    def rows(self) -> int:
        """Rows of a stack: all tokens of all heads of a tile."""
        return self.heads * self.chunk


class Masks(NamedTuple):
    """What every group of a grid step selects by."""

    strict: Array  # [R R]: the same head, an earlier token
    lower: Array  # the same, or the same token
    merges: tuple[Array, ...]  # blocks that `_inverse` fills, level by level
    blocks: Array  # [heads*Nv heads*Nk]: the blocks of the state
    key_head: Array  # [L heads*Nk]: the head that a lane belongs to
    value_head: Array


def _iota(shape: tuple[int, int], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _masks(form: Form) -> Masks:
    square = (form.rows, form.rows)
    row, column = _iota(square, 0), _iota(square, 1)
    same = row // form.chunk == column // form.chunk
    merges, block = [], 1
    while block < form.chunk:
        pair = row // (2 * block) == column // (2 * block)
        merges.append(pair & (row // block % 2 == 1) & (column // block % 2 == 0))
        block *= 2
    state = (form.heads * form.values, form.heads * form.keys)
    return Masks(
        strict=same & (row > column),
        lower=same & (row >= column),
        merges=tuple(merges),
        blocks=_iota(state, 0) // form.values == _iota(state, 1) // form.keys,
        key_head=_iota((form.chunk, state[1]), 1) // form.keys,
        value_head=_iota((form.chunk, state[0]), 1) // form.values,
    )


def _dot(x: Array, y: Array, *, left: int = 1, right: int = 0) -> Array:
    """The product over axis `left` of x and `right` of y, summed in float32."""
    precision = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    axes = (((left,), (right,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def _sums(signs: Array, x: Array, form: Form) -> Array:
    """signs @ x for entries of -1, 0, 1: exact products, in two halves of 8 bits for bfloat16."""
    if form.dtype != jnp.bfloat16:
        return _dot(signs, x)
    # By bits: a cast there and back is something that compilers like to drop.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    signs = signs.astype(jnp.bfloat16)
    halves = jnp.concatenate([high, x - high], 0).astype(jnp.bfloat16)
    return _dot(jnp.concatenate([signs, signs], 1), halves)


def _stack(x: Array, head: Array, form: Form) -> Array:
    """The rows of each head one above the other, without the other heads' lanes."""
    parts = [jnp.where(head == h, x, 0.0) for h in range(form.heads)] if form.heads > 1 else [x]
    return jnp.concatenate(parts, 0).astype(form.dtype)


def _repeat(x: Array, form: Form) -> Array:
    """The rows once for each head, all lanes; products with a stack leave the right ones."""
    return jnp.concatenate([x.astype(form.dtype)] * form.heads, 0)


def _unstack(x: Array, head: Array, form: Form) -> Array:
    """From each head's rows that head's lanes: the inverse of `_stack`, blind to other lanes."""
    out = x[: form.chunk]
    for h in range(1, form.heads):
        out = jnp.where(head == h, x[h * form.chunk : (h + 1) * form.chunk], out)
    return out


def _expand(x: Array, masks: Masks, form: Form) -> Array:
    """[Nv, heads*Nk] as a block-diagonal matrix."""
    return jnp.where(masks.blocks, jnp.concatenate([x] * form.heads, 0), 0.0)


def _compact(x: Array, form: Form) -> Array:
    """The inverse of `_expand`."""
    return sum(x[h * form.values : (h + 1) * form.values] for h in range(form.heads))


class Factors(NamedTuple):
    """The exponentials of a chunk's running decays around its middle; see `chunk_math`."""

    before: Array
    upto: Array
    after: Array
    mid: Array
    rest: Array


def _factors(log_w: Array, form: Form) -> Factors:
    square = (form.chunk, form.chunk)
    row, column = _iota(square, 0), _iota(square, 1)
    upto_row = (row >= column).astype(jnp.float32)
    centred = _sums(upto_row - (column < form.chunk // 2).astype(jnp.float32), log_w, form)
    return Factors(
        before=jnp.exp(centred - log_w),
        upto=jnp.exp(centred),
        after=jnp.exp(-centred),
        mid=jnp.exp(log_w[:1] - centred[:1]),
        rest=jnp.exp(centred[form.chunk - 1 :]),
    )


def _inverse(aab: Array, masks: Masks, form: Form) -> Iterator[Array | None]:
    """(I - aab)^-1 by merging solved blocks; a stage each, the last one's is the result."""
    square = (form.rows, form.rows)
    inverse = (_iota(square, 0) == _iota(square, 1)).astype(jnp.float32)
    inverse = inverse + jnp.where(masks.merges[0], aab, 0.0)
    for merge in masks.merges[1:]:
        operand = inverse.astype(form.dtype)
        right = _dot(jnp.where(merge, aab, 0.0).astype(form.dtype), operand).astype(form.dtype)
        yield None
        inverse = inverse + _dot(operand, right)
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


def _prepare(tokens, masks: Masks, form: Form) -> Iterator[Chunk | None]:
    """What a chunk's tokens determine without a state, stage by stage."""
    r, log_w, k, v, a, b = tokens
    factors = _factors(log_w, form)
    yield None
    ah = _stack(a * factors.before, masks.key_head, form)
    rh = _stack(r * factors.upto, masks.key_head, form)
    bh, kh = _repeat(b * factors.after, form), _repeat(k * factors.after, form)
    products = _dot(jnp.concatenate([ah, rh], 0), jnp.concatenate([bh, kh], 0), right=1)
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
        v=_stack(v, masks.value_head, form),
        inverse=inverse,
        aak=kept(masks.strict, products[:rows, rows:]),
        arb=kept(masks.lower, products[rows:, :rows]),
        ark=kept(masks.lower, products[rows:, rows:]),
    )


def _in_turns(groups: list[Iterator]) -> None:
    """Every group's next stage before any group's second next: the scheduler mixes them."""
    while groups:
        groups = [group for group in groups if next(group, StopIteration) is not StopIteration]


def _load(refs, g: int, form: Form) -> list[Array]:
    """Group g's lanes of each block, in float32."""
    sizes = (form.keys,) * 3 + (form.values,) + (form.keys,) * 2 + (form.values,)
    widths = [form.heads * size for size in sizes[: len(refs)]]
    return [
        ref[0, :, g * width : (g + 1) * width].astype(jnp.float32)
        for ref, width in zip(refs, widths, strict=True)
    ]


def _store(ref, g: int, x: Array) -> None:
    ref[0, :, g * x.shape[1] : (g + 1) * x.shape[1]] = x.astype(ref.dtype)


def _forward_group(g: int, refs, state, masks: Masks, form: Form) -> Iterator[None]:
    *inputs, y_ref, starts_ref = refs
    chunk = None
    for chunk in _prepare(_load(inputs, g, form), masks, form):
        if chunk is None:
            yield
    start = state[g]
    if starts_ref is not None:
        starts_ref[0, g, 0] = _compact(start, form)
    scaled = start * chunk.factors.mid
    operand = scaled.astype(form.dtype)
    read = _dot(chunk.ah, operand, right=1) + _dot(chunk.aak, chunk.v)
    yield
    u = _dot(chunk.inverse, read.astype(form.dtype)).astype(form.dtype)
    yield
    written = jnp.concatenate([u, chunk.v], 0)
    y = _dot(chunk.rh, operand, right=1)
    y = y + _dot(jnp.concatenate([chunk.arb, chunk.ark], 1), written)
    _store(y_ref, g, _unstack(y, masks.value_head, form))
    end = scaled + _dot(written, jnp.concatenate([chunk.bh, chunk.kh], 0), left=0)
    state[g] = jnp.where(masks.blocks, end, 0.0) * chunk.factors.rest


def _forward_kernel(*refs, form: Form, save: bool) -> None:
    """One chunk of some groups: what its tokens read, and the state behind them."""
    *tokens, start_ref, y_ref, end_ref, rest = *refs[:9], refs[9:]
    starts_ref, state = rest if save else (None, *rest)
    masks, step = _masks(form), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        for g in range(form.groups):
            state[g] = _expand(start_ref[0, g], masks, form)

    refs = (*tokens, y_ref, starts_ref)
    _in_turns([_forward_group(g, refs, state, masks, form) for g in range(form.groups)])

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for g in range(form.groups):
            end_ref[0, g] = _compact(state[g], form)


def _backward_group(g: int, refs, dstate, masks: Masks, form: Form) -> Iterator[None]:
    *inputs, dy_ref, starts_ref = refs[:8]
    tokens = _load((*inputs, dy_ref), g, form)
    chunk = None
    for chunk in _prepare(tokens[:6], masks, form):
        if chunk is None:
            yield
    kind, factors = form.dtype, chunk.factors
    dy = _stack(tokens[6], masks.value_head, form)
    scaled = _expand(starts_ref[0, g, 0], masks, form) * factors.mid
    dscaled = dstate[g] * factors.rest
    start, dend = scaled.astype(kind), dscaled.astype(kind)
    read = _dot(chunk.ah, start, right=1) + _dot(chunk.aak, chunk.v)
    du = _dot(chunk.arb, dy, left=0) + _dot(chunk.bh, dend, right=1)
    yield
    u = _dot(chunk.inverse, read.astype(kind)).astype(kind)
    z = _dot(chunk.inverse, du.astype(kind), left=0).astype(kind)
    yield
    dv = _dot(jnp.concatenate([chunk.ark, chunk.aak], 0), jnp.concatenate([dy, z], 0), left=0)
    dv = dv + _dot(chunk.kh, dend, right=1)
    _store(refs[11], g, _unstack(dv, masks.value_head, form))
    dstart = dscaled + _dot(
        jnp.concatenate([dy, z], 0), jnp.concatenate([chunk.rh, chunk.ah], 0), left=0
    )
    dstate[g] = jnp.where(masks.blocks, dstart, 0.0) * factors.mid
    products = _dot(jnp.concatenate([z, dy], 0), jnp.concatenate([u, chunk.v], 0), right=1)
    yield
    grads = _key_gradients(chunk, products, (u, z, dy, start, dend), masks, form)
    yield
    decay = _decay_gradient(chunk, grads, jnp.sum(scaled * dscaled, 0, keepdims=True), masks, form)
    scales = (factors.upto, factors.after, factors.before, factors.after)
    outputs = (refs[8], refs[10], refs[12], refs[13])
    for ref, (inside, outside), scale in zip(outputs, grads, scales, strict=True):
        _store(ref, g, (inside + outside) * scale)
    _store(refs[9], g, decay)


def _key_gradients(chunk: Chunk, products, operands, masks: Masks, form: Form):
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
        (_dot(jnp.concatenate([drb, drk], 1), right), _dot(dy, start)),
        (_dot(jnp.concatenate([dak, drk], 0), left, left=0), _dot(chunk.v, dend)),
        (_dot(jnp.concatenate([dab, dak], 1), right), _dot(z, start)),
        (_dot(jnp.concatenate([dab, drb], 0), left, left=0), _dot(u, dend)),
    )
    return [tuple(_unstack(x, masks.key_head, form) for x in pair) for pair in pairs]


def _decay_gradient(chunk: Chunk, grads, ends: Array, masks: Masks, form: Form) -> Array:
    """Of log_w; `chunk_math.backward` says why the factors are the operands themselves."""
    (dr, dr_start), (dk, dk_end), (da, da_start), (db, db_end) = grads
    stacks = (chunk.rh, chunk.kh, chunk.ah, chunk.bh)
    r, k, a, b = (_unstack(x.astype(jnp.float32), masks.key_head, form) for x in stacks)
    removal = a * (da + da_start)
    inside = r * (dr + dr_start) + removal - b * db - k * dk
    to_end = b * db_end + k * dk_end
    square = (form.chunk, form.chunk)
    row, column = _iota(square, 0), _iota(square, 1)
    signs = jnp.concatenate([row <= column, row > column], 1).astype(jnp.float32)
    return _sums(signs, jnp.concatenate([inside, to_end], 0), form) - removal + ends


def _backward_kernel(*refs, form: Form) -> None:
    """One chunk of some groups, the last chunk first: gradients of its inputs and start state."""
    inputs, dend_ref, outputs, dstart_ref, dstate = refs[:8], refs[8], refs[9:15], *refs[15:]
    masks, step = _masks(form), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        for g in range(form.groups):
            dstate[g] = _expand(dend_ref[0, g], masks, form)

    group_refs = (*inputs, *outputs)
    _in_turns([_backward_group(g, group_refs, dstate, masks, form) for g in range(form.groups)])

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for g in range(form.groups):
            dstart_ref[0, g] = _compact(dstate[g], form)


def _form(inputs: Inputs, chunk: int, groups: int) -> Form:
    """How these inputs are tiled; `groups` is the most that go through a step together."""
    heads, keys, values = inputs[0].shape[2], inputs[0].shape[3], inputs[3].shape[3]
    shared = math.lcm(LANES // math.gcd(LANES, keys), LANES // math.gcd(LANES, values))
    tiles = -(-heads // shared)
    groups = max(n for n in range(1, groups + 1) if tiles % n == 0)
    dtype = jnp.dtype(jnp.bfloat16 if inputs[3].dtype == jnp.bfloat16 else jnp.float32)
    return Form(chunk, shared, keys, values, groups, dtype)


def _flat(x: Float[Array, "B T H N"], form: Form) -> Float[Array, "B T HN"]:
    """Whole chunks of whole tiles; zeros fill both, and change nothing."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % form.chunk), (0, -x.shape[2] % form.heads), (0, 0)))
    return x.reshape(*x.shape[:2], -1)


def _wide(state: State, form: Form) -> Float[Array, "B G Nv W"]:
    """The heads of a tile side by side."""
    state = jnp.pad(state, ((0, 0), (0, -state.shape[1] % form.heads), (0, 0), (0, 0)))
    batch, heads, values, keys = state.shape
    state = state.reshape(batch, heads // form.heads, form.heads, values, keys)
    return state.swapaxes(2, 3).reshape(batch, -1, values, form.heads * keys)


def _narrow(state: Float[Array, "B G Nv W"], heads: int, form: Form) -> State:
    """The inverse of `_wide`."""
    batch, tiles, values, _ = state.shape
    state = state.reshape(batch, tiles, values, form.heads, form.keys).swapaxes(2, 3)
    return state.reshape(batch, -1, values, form.keys)[:, :heads]


def _call(kernel, form: Form, arrays, outputs, *, step, interpret):
    """`pl.pallas_call` over (batch, groups of tiles, chunks); `step` maps a grid step to its chunk.

    Args:
        kernel: takes all arrays' blocks, all outputs' blocks, and the state in scratch memory.
        form: its sizes.
        arrays: tokens [B T W], states [B G Nv W] or chunk states [B G C Nv W].
        outputs: shapes and dtypes of the same three kinds.
        step: from the grid's last index to the chunk's number.
        interpret: for `pl.pallas_call`.
    """

    def block(x):
        if x.ndim == 3:
            width = x.shape[2] // tiles * form.groups
            return pl.BlockSpec((1, form.chunk, width), lambda i, j, c: (i, step(c), j))
        if x.ndim == 4:
            return pl.BlockSpec((1, form.groups, *x.shape[2:]), lambda i, j, c: (i, j, 0, 0))
        shape = (1, form.groups, 1, *x.shape[3:])
        return pl.BlockSpec(shape, lambda i, j, c: (i, j, step(c), 0, 0))

    width = form.heads * form.keys
    tiles = arrays[0].shape[2] // width
    grid = (arrays[0].shape[0], tiles // form.groups, arrays[0].shape[1] // form.chunk)
    state = (form.groups, form.heads * form.values, width)
    semantics = ("parallel", "parallel", "arbitrary")
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[block(x) for x in arrays],
        out_specs=[block(x) for x in outputs],
        out_shape=outputs,
        scratch_shapes=[pltpu.VMEM(state, jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=interpret,
        name=f"wkv7_{kernel.func.__name__.strip('_')}",
    )(*arrays)


def _run_forward(inputs: Inputs, state: State, chunk: int, groups: int, save: bool, interpret):
    form = _form(inputs, chunk, groups)
    tokens, heads = inputs[3].shape[1:3]
    arrays = [_flat(x, form) for x in inputs] + [_wide(state, form)]
    outputs = [jax.ShapeDtypeStruct(arrays[3].shape, inputs[3].dtype)]
    outputs.append(jax.ShapeDtypeStruct(arrays[6].shape, jnp.float32))
    if save:
        batch, tiles, *block = arrays[6].shape
        shape = (batch, tiles, arrays[0].shape[1] // form.chunk, *block)
        outputs.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    kernel = functools.partial(_forward_kernel, form=form, save=save)
    y, end, *starts = _call(kernel, form, arrays, outputs, step=lambda c: c, interpret=interpret)
    y = y.reshape(*y.shape[:2], -1, form.values)[:, :tokens, :heads]
    return y, _narrow(end, heads, form), *starts


def forward(
    inputs: Inputs, state: State, *, chunk: int = 64, groups: int = 4, interpret=False
) -> tuple[Float[Array, "B T H Nv"], State]:
    """What every token reads, and the state behind the last.

    Args:
        inputs: r, log_w, k, v, a, b. Products take bfloat16 operands if v has that dtype, else
            float32 ones.
        state: float32.
        chunk: tokens a grid step.
        groups: tiles of 128 lanes that share a grid step, at most.
        interpret: run in Pallas's interpreter, for tests.
    """
    return _run_forward(inputs, state, chunk, groups, False, interpret)


def forward_saving(
    inputs: Inputs, state: State, *, chunk: int = 64, groups: int = 4, interpret=False
) -> tuple[Float[Array, "B T H Nv"], State, Starts]:
    """As `forward`, and the states at the start of every chunk."""
    return _run_forward(inputs, state, chunk, groups, True, interpret)


def backward(
    inputs: Inputs,
    starts: Starts,
    dy: Float[Array, "B T H Nv"],
    dend: State,
    *,
    chunk: int = 64,
    groups: int = 4,
    interpret=False,
) -> tuple[tuple[Array, ...], State]:
    """Gradients of the six inputs and the start state, from what `forward_saving` kept."""
    form = _form(inputs, chunk, groups)
    tokens, heads = dy.shape[1:3]
    arrays = [*(_flat(x, form) for x in (*inputs, dy)), starts, _wide(dend, form)]
    outputs = [
        jax.ShapeDtypeStruct(x.shape, given.dtype)
        for x, given in zip(arrays[:6], inputs, strict=True)
    ]
    outputs.append(jax.ShapeDtypeStruct(arrays[8].shape, jnp.float32))
    last = starts.shape[2] - 1
    kernel = functools.partial(_backward_kernel, form=form)
    *grads, dstate = _call(
        kernel, form, arrays, outputs, step=lambda c: last - c, interpret=interpret
    )
    sizes = [form.keys, form.keys, form.keys, form.values, form.keys, form.keys]
    grads = [
        x.reshape(*x.shape[:2], -1, size)[:, :tokens, :heads]
        for x, size in zip(grads, sizes, strict=True)
    ]
    return tuple(grads), _narrow(dstate, heads, form)
