"""WKV-7 on NVIDIA GPUs: Pallas kernels, through Pallas's Triton lowering. Level 0.

Three kernels: forward, the states' gradients, and from both everything else, in parallel over the
chunks. The states between them are kept scaled, as the products read them, in the tokens' dtype.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from . import gpu_kernels as kernels
from .reference import Inputs, State
from .tiles import Tile, Tiles

# Scaled states, one a chunk.
Starts = Float[Array, "B H C Nv Nk"]
INPUTS = ("keys", "keys", "keys", "values", "keys", "keys")


def _walking(sizes, rows: int) -> dict:
    """Blocks of the kernels that walk, by kind of array: a head's tokens, and some value rows."""
    (_, tokens, _, keys), chunks = sizes
    return {
        "keys": pl.BlockSpec((1, tokens, 1, keys), lambda j, h, b: (b, 0, h, 0)),
        "values": pl.BlockSpec((1, tokens, 1, rows), lambda j, h, b: (b, 0, h, j)),
        "state": pl.BlockSpec((1, 1, rows, keys), lambda j, h, b: (b, h, j, 0)),
        "states": pl.BlockSpec((1, 1, chunks, rows, keys), lambda j, h, b: (b, h, 0, j, 0)),
    }


def _single(chunk: int, keys: int, values: int) -> dict:
    """Blocks of the kernel that sees one chunk of one head."""
    return {
        "keys": pl.BlockSpec((1, chunk, 1, keys), lambda c, h, b: (b, c, h, 0)),
        "values": pl.BlockSpec((1, chunk, 1, values), lambda c, h, b: (b, c, h, 0)),
        "states": pl.BlockSpec((1, 1, 1, values, keys), lambda c, h, b: (b, h, c, 0, 0)),
    }


def _call(kernel, grid, blocks: dict, arrays, outputs, tile: Tile, interpret):
    """`pl.pallas_call` on (kind, array) and (kind, shape) pairs."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[blocks[kind] for kind, _ in arrays],
        out_specs=[blocks[kind] for kind, _ in outputs],
        out_shape=[shape for _, shape in outputs],
        compiler_params=pltriton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"wkv7_{kernel.func.__name__}",
    )(*(x for _, x in arrays))


def _walk(kernel, arrays, outputs, chunk: int, tile: Tile, interpret):
    shape, values = arrays[0][1].shape, arrays[-1][1].shape[2]
    batch, tokens, heads, _ = shape
    rows = tile.values
    while values % rows:
        rows //= 2
    blocks = _walking((shape, tokens // chunk), rows)
    kernel = functools.partial(kernel, chunk=chunk, interpret=interpret)
    return _call(kernel, (values // rows, heads, batch), blocks, arrays, outputs, tile, interpret)


def _padded(x: Float[Array, "B T H N"], chunk: int) -> Float[Array, "B T H N"]:
    """Whole chunks; zeros fill the last, and change nothing."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), (0, 0), (0, 0)))


def _forward(inputs: Inputs, state: State, chunk: int, tile: Tile, save: bool, interpret):
    arrays = list(zip(INPUTS, (_padded(x, chunk) for x in inputs), strict=True))
    v = arrays[3][1]
    outputs = [("state", jax.ShapeDtypeStruct(state.shape, jnp.float32))]
    outputs.append(("values", jax.ShapeDtypeStruct(v.shape, v.dtype)))
    if save:
        batch, heads, *matrix = state.shape
        shape = (batch, heads, v.shape[1] // chunk, *matrix)
        outputs.append(("states", jax.ShapeDtypeStruct(shape, v.dtype)))
    arrays.append(("state", state))
    end, y, *starts = _walk(kernels.forward_kernel, arrays, outputs, chunk, tile, interpret)
    return y[:, : inputs[3].shape[1]], end, *starts
T64 = Tiles(Tile(4,1,64),Tile(4,2,64),Tile(4,1,64))

def forward_saving(inputs, state, *, chunk=32, tiles=T64, interpret=False):
    return _forward(inputs, state, chunk, tiles.forward, True, interpret)


def backward(inputs, starts, dy, dend, *, chunk=32, tiles=T64, interpret=False):
    """Gradients of the six inputs and the start state, from what `forward_saving` kept."""
    arrays = list(zip(INPUTS, (_padded(x, chunk) for x in inputs), strict=True))
    padded = ("values", _padded(dy, chunk))
    walked = [arrays[i] for i in (0, 1, 4, 5)] + [padded, ("state", dend)]
    outputs = [("state", jax.ShapeDtypeStruct(dend.shape, jnp.float32))]
    outputs.append(("states", jax.ShapeDtypeStruct(starts.shape, starts.dtype)))
    dstart, ends = _walk(
        kernels.state_kernel, walked, outputs, chunk, tiles.state_gradient, interpret
    )
    (batch, tokens, heads, keys), values = arrays[0][1].shape, dy.shape[3]
    tile = tiles.gradients
    grads = _call(
        functools.partial(kernels.gradients_kernel, values=min(tile.values, values), interpret=interpret),
        (tokens // chunk, heads, batch),
        _single(chunk, keys, values),
        [*arrays, padded, ("states", starts), ("states", ends)],
        [(kind, jax.ShapeDtypeStruct(x.shape, x.dtype)) for kind, x in arrays],
        tile,
        interpret,
    )
    return tuple(x[:, : dy.shape[1]] for x in grads), dstart
