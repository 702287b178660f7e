"""WKV-7 on TPU: calls of the Pallas kernels, in which a grid step computes a chunk of tokens.

A single token, as in decoding, has a kernel of its own: see `token_step`.

Tokens are bfloat16 or float32, states float32. Matrix products take bfloat16 operands if v is
bfloat16, else float32 operands.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import tiles
from pallas_kernels.packed_rows import Owners, chunk_spans
from pallas_kernels.platforms import output_like
from pallas_kernels.reference import State, WKVInputs
from pallas_kernels.tpu import kernel_bodies as kernels
from pallas_kernels.tpu import token_step
from pallas_kernels.tpu.head_packing import (
    LANES,
    TileLayout,
    heads_per_tile,
    pack_states,
    unpack_states,
)

Interpret = bool | pltpu.InterpretParams
# The VMEM limit of a kernel; every listed chip has at least twice as much.
VMEM = 32 * 2**20
# States at the start of every chunk: rows are values, columns the keys of all heads of a tile.
Starts = Float[Array, "B G C Nv W"]


def choose_layout(inputs: WKVInputs, chunk: int | None) -> TileLayout:
    """Chooses the tiling: a grid step computes a chunk of `groups` tiles of heads."""
    v = inputs.v
    heads, keys = inputs.r.shape[2:]
    values = v.shape[3]
    choice = tiles.for_tpu(v.dtype)
    shared = heads_per_tile(keys, values)
    # Tiles of all heads, rounded up.
    columns = -(-heads // shared)
    # The table's groups are for tiles of 128 lanes; wider tiles need more VMEM.
    most = max(1, choice.groups * LANES // (shared * max(keys, values)))
    # The grid has no remainder: groups must divide the number of tiles.
    groups = max(n for n in range(1, most + 1) if columns % n == 0)
    return TileLayout(
        chunk=chunk or choice.chunk,
        heads=shared,
        keys=keys,
        values=values,
        groups=groups,
        dtype=jnp.dtype(jnp.bfloat16 if v.dtype == jnp.bfloat16 else jnp.float32),
    )


def _flatten_heads(
    x: Float[Array, "B T H N"], layout: TileLayout
) -> Float[Array, "B TC HGN"]:
    """Pads tokens to full chunks and heads to full tiles, and joins the axes of the heads."""
    # Zeros change neither the state nor a gradient.
    tokens = -x.shape[1] % layout.chunk
    heads = -x.shape[2] % layout.heads
    x = jnp.pad(x, ((0, 0), (0, tokens), (0, heads), (0, 0)))
    return x.reshape(*x.shape[:2], -1)


def _split_heads(
    x: Float[Array, "B TC HGN"], like: Float[Array, "B T H N"]
) -> Float[Array, "B T H N"]:
    """Inverts `_flatten_heads` for an array of the shape of `like`."""
    _, tokens, heads, size = like.shape
    return x.reshape(*x.shape[:2], -1, size)[:, :tokens, :heads]


def _call(
    kernel: Callable,
    layout: TileLayout,
    arrays: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    owners: Owners | None,
    chunk_of: Callable,
    name: str,
    interpret: Interpret,
) -> Sequence[Array]:
    """Calls `pl.pallas_call` over a grid of (batch, groups of tiles, chunks).

    Args:
        kernel: takes the blocks of the arrays and outputs, and scratch memory for the state.
        layout: its sizes.
        arrays: tokens [B T W], states [S G Nv W] or chunk states [B G C Nv W].
        outputs: shapes and dtypes of the same three kinds.
        owners: for packed rows the sequence of each chunk; else None.
        chunk_of: maps the grid's last index to the index of the chunk.
        name: of the kernel; the compile checks look for it.
        interpret: for `pl.pallas_call`.
    """
    width = layout.heads * layout.keys
    batch, tokens, all_keys = arrays[0].shape
    columns = all_keys // width
    steps = tokens // layout.chunk
    # Prefetched, because they determine the next block of the states.
    known = [] if owners is None else [owners.reshape(-1)]

    def state_of(i, c, known):
        if owners is None:
            return i
        (flat,) = known
        each = packed_states // batch
        return i * each + flat[i * steps + chunk_of(c)]

    def block(x):
        if x.ndim == 3:
            # [B T W], with the lanes of all tiles side by side. v and dy may differ in width.
            lanes = x.shape[2] // columns * layout.groups
            return pl.BlockSpec(
                (1, layout.chunk, lanes), lambda i, j, c, *known: (i, chunk_of(c), j)
            )
        if x.ndim == 4:
            return pl.BlockSpec(
                (1, layout.groups, *x.shape[2:]),
                lambda i, j, c, *known: (state_of(i, c, known), j, 0, 0),
            )
        shape = (1, layout.groups, 1, *x.shape[3:])
        return pl.BlockSpec(shape, lambda i, j, c, *known: (i, j, chunk_of(c), 0, 0))

    def body(*refs):
        if owners is None:
            return kernel(*refs, layout=layout, chunk_of=chunk_of)
        return kernel(*refs[1:], layout=layout, chunk_of=chunk_of, owners=refs[0])

    packed_states = arrays[-1].shape[0]
    state_shape = (layout.groups, layout.heads * layout.values, width)
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(known),
            grid=(batch, columns // layout.groups, steps),
            in_specs=[block(x) for x in arrays],
            out_specs=[block(x) for x in outputs],
            scratch_shapes=[pltpu.VMEM(state_shape, jnp.float32)],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            # Chunks run in order, because the state stays in scratch memory.
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM,
        ),
        interpret=interpret,
        name=name,
    )(*known, *arrays)


def _keep_unvisited(new: State, old: State, owners: Owners | None) -> State:
    """Restores the states of sequences without a chunk, which no grid step writes."""
    if owners is None:
        return new
    first, end = chunk_spans(owners, old.shape[0] // owners.shape[0]).T
    return jnp.where((first == end)[:, None, None, None], old, new)


def _run_forward(
    inputs: WKVInputs,
    state: State,
    owners: Owners | None,
    chunk: int | None,
    save: bool,
    interpret: Interpret,
) -> tuple[Array, ...]:
    layout = choose_layout(inputs, chunk)
    v = inputs.v
    tokens = WKVInputs(*(_flatten_heads(x, layout) for x in inputs))
    packed = pack_states(state, layout.heads)
    outputs = [
        output_like(tokens.v.shape, v.dtype, v, state),
        output_like(packed.shape, jnp.float32, v, state),
    ]
    # The saved states are float32, unlike y, because the backward pass starts from them.
    if save:
        batch = v.shape[0]
        _, columns, *block = packed.shape
        chunks = tokens.r.shape[1] // layout.chunk
        outputs.append(
            output_like((batch, columns, chunks, *block), jnp.float32, v, state)
        )
    y, end, *starts = _call(
        functools.partial(kernels.forward_kernel, save=save),
        layout,
        [*tokens, packed],
        outputs,
        owners=owners,
        chunk_of=lambda c: c,
        name="wkv7_forward_kernel",
        interpret=interpret,
    )
    end = unpack_states(end, heads=v.shape[2], keys=layout.keys)
    return _split_heads(y, v), _keep_unvisited(end, state, owners), *starts


def forward(
    inputs: WKVInputs,
    state: State,
    owners: Owners | None = None,
    *,
    chunk: int | None = None,
    interpret: Interpret = False,
) -> tuple[Float[Array, "B T H Nv"], State]:
    """Computes y and the state after the last token."""
    if inputs.r.shape[1] == 1 and owners is None:
        tiled = token_step.tile(state)
        y, tiled = token_step.run_kernel(inputs, tiled, interpret=interpret)
        return y, token_step.untile(tiled)
    y, end = _run_forward(inputs, state, owners, chunk, False, interpret)
    return y, end


def forward_saving(
    inputs: WKVInputs,
    state: State,
    owners: Owners | None = None,
    *,
    chunk: int | None = None,
    interpret: Interpret = False,
) -> tuple[Float[Array, "B T H Nv"], State, Starts]:
    """Computes what `forward` does, and the states at the start of every chunk."""
    y, end, starts = _run_forward(inputs, state, owners, chunk, True, interpret)
    return y, end, starts


def backward(
    inputs: WKVInputs,
    starts: Starts,
    dy: Float[Array, "B T H Nv"],
    dend: State,
    owners: Owners | None = None,
    *,
    chunk: int | None = None,
    interpret: Interpret = False,
) -> tuple[WKVInputs, State]:
    """Computes the gradients of the six inputs and of the start state."""
    layout = choose_layout(inputs, chunk)
    tokens = WKVInputs(*(_flatten_heads(x, layout) for x in inputs))
    flat_dy = _flatten_heads(dy, layout)
    packed = pack_states(dend, layout.heads)
    outputs = []
    for flat, x in zip(tokens, inputs, strict=True):
        outputs.append(output_like(flat.shape, x.dtype, x, dy))
    outputs.append(output_like(packed.shape, jnp.float32, dend, dy))
    # The grid runs backward: its first step computes the last chunk.
    last = starts.shape[2] - 1
    *flat_grads, dstate = _call(
        kernels.backward_kernel,
        layout,
        [*tokens, flat_dy, starts, packed],
        outputs,
        owners=owners,
        chunk_of=lambda c: last - c,
        name="wkv7_backward_kernel",
        interpret=interpret,
    )
    grads = jax.tree.map(_split_heads, WKVInputs(*flat_grads), inputs)
    dstate = unpack_states(dstate, heads=dy.shape[2], keys=layout.keys)
    return grads, _keep_unvisited(dstate, dend, owners)
