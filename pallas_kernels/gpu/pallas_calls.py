"""WKV-7 on NVIDIA GPUs: calls of the Pallas kernels, which Pallas lowers through Triton."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array

from pallas_kernels import tiles
from pallas_kernels.gpu import kernel_bodies as kernels
from pallas_kernels.gpu.partitioning import unpartitioned
from pallas_kernels.gpu.segmented_passes import KernelSet, Probes, Spans
from pallas_kernels.platforms import output_like
from pallas_kernels.reference import State, WKVInputs

# The kind of block of each of the six inputs. A kernel may take a block of the value channels, but
# needs all key channels.
INPUTS = ("keys", "keys", "keys", "values", "keys", "keys")

# A kind of block and an array, or the shape of an output.
Operand = tuple[str, Array]
Output = tuple[str, jax.ShapeDtypeStruct]


def _call(
    kernel,
    grid: tuple[int, ...],
    blocks: dict[str, pl.BlockSpec],
    arrays: Sequence[Operand],
    outputs: Sequence[Output],
    tile: tiles.Tile,
    interpret: bool,
    aliases: dict[int, int] | None = None,
) -> Sequence[Array]:
    """Calls `pl.pallas_call` with the specs of the arrays' and outputs' kinds of block.

    `aliases` maps the index of an array to that of the output that may overwrite it.
    """
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[blocks[kind] for kind, _ in arrays],
        out_specs=[blocks[kind] for kind, _ in outputs],
        out_shape=[shape for _, shape in outputs],
        compiler_params=pltriton.CompilerParams(
            num_warps=tile.warps, num_stages=tile.stages
        ),
        input_output_aliases=aliases or {},
        interpret=interpret,
        # A kernel may be a partial, which has no name. The compile checks look for "wkv7_".
        name=f"wkv7_{getattr(kernel, 'func', kernel).__name__}",
    )(*(x for _, x in arrays))


def _walk(
    kernel,
    arrays: Sequence[Operand],
    outputs: Sequence[Output],
    choice: tiles.GPU,
    tile: tiles.Tile,
    probes: Probes | None,
    spans: Spans | None,
    interpret: bool,
) -> Sequence[Array]:
    """Runs one program, which loops over the chunks, for every head and block of value rows."""
    _, first = arrays[0]
    _, state = arrays[-1]
    batch, tokens, heads, keys = first.shape
    values = state.shape[2]
    # Must divide the number of values, which with probes is Nv + Nk, such as 320.
    rows = tile.values
    while values % rows:
        rows //= 2
    chunks = tokens // choice.chunk
    # States per row: one per packed sequence.
    each = state.shape[0] // batch

    def row(s):
        return s if each == 1 else jax.lax.div(s, each)

    blocks = {
        # Grid indices: head h, block of values j, state s. A block has all tokens of a head. Heads
        # come first, so that consecutive programs read neighbouring memory.
        "keys": pl.BlockSpec((1, tokens, 1, keys), lambda h, j, s: (row(s), 0, h, 0)),
        "values": pl.BlockSpec((1, tokens, 1, rows), lambda h, j, s: (row(s), 0, h, j)),
        "state": pl.BlockSpec((1, 1, rows, keys), lambda h, j, s: (s, h, j, 0)),
        "states": pl.BlockSpec(
            (1, 1, chunks, keys, rows), lambda h, j, s: (row(s), h, 0, 0, j)
        ),
        "span": pl.BlockSpec((1, 2), lambda h, j, s: (s, 0)),
    }
    if spans is not None:
        arrays = [*arrays, ("span", spans)]
    kernel = functools.partial(
        kernel,
        chunk=choice.chunk,
        arithmetic=kernels.choose_arithmetic(first.dtype, choice, interpret),
        probes=probes,
        packed=spans is not None,
    )
    grid = (heads, values // rows, state.shape[0])
    return _call(kernel, grid, blocks, arrays, outputs, tile, interpret)


def _chunk_states(state: State, v: Array, choice: tiles.GPU) -> jax.ShapeDtypeStruct:
    """Describes one state for each chunk, in the tokens' dtype."""
    batch = v.shape[0]
    _, heads, values, keys = state.shape
    chunks = v.shape[1] // choice.chunk
    return output_like((batch, heads, chunks, keys, values), v.dtype, state, v)


def token_tile(keys: int) -> tiles.Tile:
    """Returns the tile of the token kernel.

    A program is one warp, whose threads hold 32 numbers of the state each. Sums over keys then need
    no shared memory, and 32 programs of a multiprocessor have 128 KiB of states in flight.
    """
    return tiles.Tile(warps=1, stages=1, values=max(1, 1024 // keys))


class PallasKernels(KernelSet):
    """The Pallas kernels; `KernelSet` describes their results."""

    table = tiles.PALLAS_GPU

    def forward_kernel(
        self,
        inputs: WKVInputs,
        state: State,
        choice: tiles.GPU,
        save: bool,
        probes: Probes | None,
        spans: Spans | None,
        interpret: bool,
    ) -> Sequence[Array]:
        """Calls the forward kernel."""
        v = inputs.v
        arrays = [*zip(INPUTS, inputs, strict=True), ("state", state)]
        outputs = [("state", output_like(state.shape, jnp.float32, state, v))]
        # Probing the segments needs only the end states.
        if probes is None:
            outputs.append(("values", output_like(v.shape, v.dtype, state, v)))
        if save:
            outputs.append(("states", _chunk_states(state, v, choice)))
        return _walk(
            kernels.forward_kernel,
            arrays,
            outputs,
            choice,
            choice.forward,
            probes,
            spans,
            interpret,
        )

    def state_kernel(
        self,
        inputs: WKVInputs,
        dy: Array,
        dend: State,
        choice: tiles.GPU,
        probes: Probes | None,
        spans: Spans | None,
        interpret: bool,
    ) -> Sequence[Array]:
        """Calls the kernel of the state gradients."""
        arrays = [
            ("keys", inputs.r),
            ("keys", inputs.log_w),
            ("keys", inputs.a),
            ("keys", inputs.b),
            ("values", dy),
            ("state", dend),
        ]
        outputs = [("state", output_like(dend.shape, jnp.float32, dend, dy))]
        if probes is None:
            outputs.append(("states", _chunk_states(dend, dy, choice)))
        return _walk(
            kernels.state_kernel,
            arrays,
            outputs,
            choice,
            choice.state,
            probes,
            spans,
            interpret,
        )

    def gradients_kernel(
        self,
        inputs: WKVInputs,
        dy: Array,
        starts: Array,
        ends: Array,
        choice: tiles.GPU,
        interpret: bool,
    ) -> Sequence[Array]:
        """Calls the kernel of the input gradients."""
        batch, tokens, heads, keys = inputs.r.shape
        values = dy.shape[3]
        chunk = choice.chunk
        blocks = {
            # One grid index is the chunk c: given S^ and G^, chunks are independent.
            "keys": pl.BlockSpec((1, chunk, 1, keys), lambda h, c, b: (b, c, h, 0)),
            "values": pl.BlockSpec((1, chunk, 1, values), lambda h, c, b: (b, c, h, 0)),
            "states": pl.BlockSpec(
                (1, 1, 1, keys, values), lambda h, c, b: (b, h, c, 0, 0)
            ),
        }
        six = list(zip(INPUTS, inputs, strict=True))
        arrays = [*six, ("values", dy), ("states", starts), ("states", ends)]
        outputs = [(kind, output_like(x.shape, x.dtype, x, dy)) for kind, x in six]
        grid = (heads, tokens // chunk, batch)
        arithmetic = kernels.choose_arithmetic(dy.dtype, choice, interpret)
        kernel = functools.partial(kernels.gradients_kernel, arithmetic=arithmetic)
        tile = choice.gradients
        return _call(kernel, grid, blocks, arrays, outputs, tile, interpret)

    def token_kernel(
        self, inputs: WKVInputs, state: State, interpret: bool
    ) -> tuple[Array, Array]:
        """Calls the token kernel."""
        batch, heads, values, keys = state.shape
        tile = token_tile(keys)
        inputs = inputs._replace(r=unpartitioned(inputs.r))
        rows = min(values, tile.values)
        blocks = {
            "keys": pl.BlockSpec((1, 1, 1, keys), lambda h, j, b: (b, 0, h, 0)),
            "values": pl.BlockSpec((1, 1, 1, rows), lambda h, j, b: (b, 0, h, j)),
            "state": pl.BlockSpec((1, 1, rows, keys), lambda h, j, b: (b, h, j, 0)),
        }
        v = inputs.v
        arrays = [*zip(INPUTS, inputs, strict=True), ("state", state)]
        outputs = [
            ("state", output_like(state.shape, jnp.float32, state, v)),
            ("values", output_like(v.shape, v.dtype, state, v)),
        ]
        kernel = kernels.token_kernel
        grid = (heads, values // rows, batch)
        aliases = {len(inputs): 0}
        end, y = _call(kernel, grid, blocks, arrays, outputs, tile, interpret, aliases)
        return y, end


KERNELS = PallasKernels()
