"""WKV-7 on NVIDIA GPUs: the kernels' calls in Pallas, through its Triton lowering."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array

from pallas_kernels import tiles
from pallas_kernels.gpu import kernel_bodies as kernels
from pallas_kernels.gpu.segmented_passes import KernelSet
from pallas_kernels.platforms import output_like
from pallas_kernels.reference import Inputs, State

INPUTS = ("keys", "keys", "keys", "values", "keys", "keys")


def _call(kernel, grid, blocks: dict, arrays, outputs, tile: tiles.Tile, interpret):
    """`pl.pallas_call` on pairs of a kind of block and an array, or its shape."""
    return pl.pallas_call(
        functools.partial(kernel, interpret=interpret),
        grid=grid,
        in_specs=[blocks[kind] for kind, _ in arrays],
        out_specs=[blocks[kind] for kind, _ in outputs],
        out_shape=[shape for _, shape in outputs],
        compiler_params=pltriton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"wkv7_{getattr(kernel, 'func', kernel).__name__}",
    )(*(x for _, x in arrays))


def _walk(kernel, arrays, outputs, choice: tiles.GPU, tile: tiles.Tile, interpret):
    """A program for every head and block of value rows."""
    (batch, tokens, heads, keys), values = arrays[0][1].shape, arrays[-1][1].shape[2]
    rows = tile.values
    while values % rows:
        rows //= 2
    chunks = tokens // choice.chunk
    blocks = {
        "keys": pl.BlockSpec((1, tokens, 1, keys), lambda j, h, b: (b, 0, h, 0)),
        "values": pl.BlockSpec((1, tokens, 1, rows), lambda j, h, b: (b, 0, h, j)),
        "state": pl.BlockSpec((1, 1, rows, keys), lambda j, h, b: (b, h, j, 0)),
        "states": pl.BlockSpec((1, 1, chunks, keys, rows), lambda j, h, b: (b, h, 0, 0, j)),
    }
    kernel = functools.partial(kernel, chunk=choice.chunk)
    return _call(kernel, (values // rows, heads, batch), blocks, arrays, outputs, tile, interpret)


def _states(state: State, v: Array, choice: tiles.GPU) -> jax.ShapeDtypeStruct:
    """One state a chunk, in the tokens' dtype."""
    batch, heads, values, keys = state.shape
    return output_like((batch, heads, v.shape[1] // choice.chunk, keys, values), v.dtype, state, v)


def _forward(inputs: Inputs, state: State, choice: tiles.GPU, save: bool | None, interpret):
    v, arrays = inputs[3], [*zip(INPUTS, inputs, strict=True), ("state", state)]
    outputs = [("state", output_like(state.shape, jnp.float32, state, v))]
    if save is not None:
        outputs.append(("values", output_like(v.shape, v.dtype, state, v)))
    if save:
        outputs.append(("states", _states(state, v, choice)))
    return _walk(kernels.forward_kernel, arrays, outputs, choice, choice.forward, interpret)


def _state(r, log_w, a, b, dy, dend: State, choice: tiles.GPU, save: bool, interpret):
    arrays = [("keys", x) for x in (r, log_w, a, b)] + [("values", dy), ("state", dend)]
    outputs = [("state", output_like(dend.shape, jnp.float32, dend, dy))]
    if save:
        outputs.append(("states", _states(dend, dy, choice)))
    return _walk(kernels.state_kernel, arrays, outputs, choice, choice.state, interpret)


def _gradients(inputs: Inputs, dy, starts, ends, choice: tiles.GPU, interpret):
    (batch, tokens, heads, keys), values, chunk = inputs[0].shape, dy.shape[3], choice.chunk
    blocks = {
        "keys": pl.BlockSpec((1, chunk, 1, keys), lambda c, h, b: (b, c, h, 0)),
        "values": pl.BlockSpec((1, chunk, 1, values), lambda c, h, b: (b, c, h, 0)),
        "states": pl.BlockSpec((1, 1, 1, keys, values), lambda c, h, b: (b, h, c, 0, 0)),
    }
    arrays = list(
        zip((*INPUTS, "values", "states", "states"), (*inputs, dy, starts, ends), strict=True)
    )
    outputs = [(kind, output_like(x.shape, x.dtype, x, dy)) for kind, x in arrays[:6]]
    grid = (tokens // chunk, heads, batch)
    return _call(
        kernels.gradients_kernel, grid, blocks, arrays, outputs, choice.gradients, interpret
    )


passes = KernelSet(tiles.PALLAS_GPU, _forward, _state, _gradients)
