"""WKV-7 on TPU: Pallas kernels forward and backward, a chunk of tokens a grid step."""

import functools
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import tiles
from pallas_kernels.platforms import output_like
from pallas_kernels.reference import Inputs, State
from pallas_kernels.tpu import kernel_bodies as kernels
from pallas_kernels.tpu.head_packing import TileLayout

Interpret = bool | pltpu.InterpretParams
LANES = 128
# What a kernel may take of the fast memory, of which every listed chip has twice that or more.
VMEM = 32 * 2**20
# States at the start of every chunk: rows are values, columns the keys of all heads of a tile.
Starts = Float[Array, "B G C Nv W"]


def form_of(inputs: Inputs, chunk: int | None) -> TileLayout:
    """How these inputs are tiled: a grid step takes a chunk of `groups` tiles of `heads`."""
    choice = tiles.for_tpu(inputs[3].dtype)
    heads, keys, values = inputs[0].shape[2], inputs[0].shape[3], inputs[3].shape[3]
    shared = math.lcm(LANES // math.gcd(LANES, keys), LANES // math.gcd(LANES, values))
    columns = -(-heads // shared)
    most = max(1, choice.groups * LANES // (shared * max(keys, values)))
    groups = max(n for n in range(1, most + 1) if columns % n == 0)
    dtype = jnp.dtype(jnp.bfloat16 if inputs[3].dtype == jnp.bfloat16 else jnp.float32)
    return TileLayout(chunk or choice.chunk, shared, keys, values, groups, dtype)


def _flat(x: Float[Array, "B T H N"], form: TileLayout) -> Float[Array, "B TC HGN"]:
    """Whole chunks of whole tiles; zeros fill both, and change nothing."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % form.chunk), (0, -x.shape[2] % form.heads), (0, 0)))
    return x.reshape(*x.shape[:2], -1)


def _wide(state: State, form: TileLayout) -> Float[Array, "B G Nv W"]:
    """The heads of a tile side by side."""
    state = jnp.pad(state, ((0, 0), (0, -state.shape[1] % form.heads), (0, 0), (0, 0)))
    batch, heads, values, keys = state.shape
    state = state.reshape(batch, heads // form.heads, form.heads, values, keys)
    return state.swapaxes(2, 3).reshape(batch, -1, values, form.heads * keys)


def _narrow(state: Float[Array, "B G Nv W"], heads: int, form: TileLayout) -> State:
    """The inverse of `_wide`."""
    batch, columns, values, _ = state.shape
    state = state.reshape(batch, columns, values, form.heads, form.keys).swapaxes(2, 3)
    return state.reshape(batch, -1, values, form.keys)[:, :heads]


def _call(kernel, form: TileLayout, arrays, outputs, *, step, interpret):
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
            width = x.shape[2] // columns * form.groups
            return pl.BlockSpec((1, form.chunk, width), lambda i, j, c: (i, step(c), j))
        if x.ndim == 4:
            return pl.BlockSpec((1, form.groups, *x.shape[2:]), lambda i, j, c: (i, j, 0, 0))
        shape = (1, form.groups, 1, *x.shape[3:])
        return pl.BlockSpec(shape, lambda i, j, c: (i, j, step(c), 0, 0))

    width = form.heads * form.keys
    columns = arrays[0].shape[2] // width
    grid = (arrays[0].shape[0], columns // form.groups, arrays[0].shape[1] // form.chunk)
    state = (form.groups, form.heads * form.values, width)
    semantics = ("parallel", "parallel", "arbitrary")
    params = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[block(x) for x in arrays],
        out_specs=[block(x) for x in outputs],
        out_shape=outputs,
        scratch_shapes=[pltpu.VMEM(state, jnp.float32)],
        compiler_params=params,
        interpret=interpret,
        name=f"wkv7_{kernel.func.__name__.strip('_')}",
    )(*arrays)


def _run_forward(inputs: Inputs, state: State, chunk: int | None, save: bool, interpret):
    form = form_of(inputs, chunk)
    tokens, heads = inputs[3].shape[1:3]
    arrays = [_flat(x, form) for x in inputs] + [_wide(state, form)]
    varying = (inputs[3], state)
    outputs = [output_like(arrays[3].shape, inputs[3].dtype, *varying)]
    outputs.append(output_like(arrays[6].shape, jnp.float32, *varying))
    if save:
        batch, columns, *block = arrays[6].shape
        shape = (batch, columns, arrays[0].shape[1] // form.chunk, *block)
        outputs.append(output_like(shape, jnp.float32, *varying))
    kernel = functools.partial(kernels.forward_kernel, form=form, save=save)
    y, end, *starts = _call(kernel, form, arrays, outputs, step=lambda c: c, interpret=interpret)
    y = y.reshape(*y.shape[:2], -1, form.values)[:, :tokens, :heads]
    return y, _narrow(end, heads, form), *starts


def forward(
    inputs: Inputs,
    state: State,
    *,
    chunk: int | None = None,
    interpret: Interpret = False,
) -> tuple[Float[Array, "B T H Nv"], State]:
    """What every token reads, and the state behind the last.

    Args:
        inputs: r, log_w, k, v, a, b. Products take bfloat16 operands if v has that dtype, else
            float32 ones.
        state: float32.
        chunk: tokens a grid step; None takes the table's.
        interpret: run in Pallas's interpreter, for tests.
    """
    return _run_forward(inputs, state, chunk, False, interpret)


def forward_saving(
    inputs: Inputs,
    state: State,
    *,
    chunk: int | None = None,
    interpret: Interpret = False,
) -> tuple[Float[Array, "B T H Nv"], State, Starts]:
    """As `forward`, and the states at the start of every chunk."""
    return _run_forward(inputs, state, chunk, True, interpret)


def backward(
    inputs: Inputs,
    starts: Starts,
    dy: Float[Array, "B T H Nv"],
    dend: State,
    *,
    chunk: int | None = None,
    interpret: Interpret = False,
) -> tuple[tuple[Array, ...], State]:
    """Gradients of the six inputs and the start state, from what `forward_saving` kept."""
    form = form_of(inputs, chunk)
    tokens, heads = dy.shape[1:3]
    arrays = [*(_flat(x, form) for x in (*inputs, dy)), starts, _wide(dend, form)]
    outputs = [
        output_like(x.shape, given.dtype, given, dy)
        for x, given in zip(arrays[:6], inputs, strict=True)
    ]
    outputs.append(output_like(arrays[8].shape, jnp.float32, dend, dy))
    last = starts.shape[2] - 1
    kernel = functools.partial(kernels.backward_kernel, form=form)
    *grads, dstate = _call(
        kernel, form, arrays, outputs, step=lambda c: last - c, interpret=interpret
    )
    sizes = [form.keys, form.keys, form.keys, form.values, form.keys, form.keys]
    grads = [
        x.reshape(*x.shape[:2], -1, size)[:, :tokens, :heads]
        for x, size in zip(grads, sizes, strict=True)
    ]
    return tuple(grads), _narrow(dstate, heads, form)
