"""WKV-7 on TPU: single tokens, as in decoding, in a kernel that reads and writes each state once.

XLA's program reads a state twice. With heads of 64 it also fills only half of the lanes of each
tile, in memory as in registers. A decoding loop therefore keeps its states as `TiledState`, in
which the heads that share a tile lie side by side. Everything is computed in float32.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from pallas_kernels import scan
from pallas_kernels.platforms import output_like
from pallas_kernels.reference import State, WKVInputs
from pallas_kernels.tpu.head_packing import (
    heads_per_tile,
    iota,
    pack_states,
    unpack_states,
)

Interpret = bool | pltpu.InterpretParams

# Rows of a grid step: the sublanes of a tile, which holds the tokens of several rows.
_ROWS = 8

# Tiles of states of a grid step, whose code is unrolled, and their bytes. Two steps are in memory.
_TILES = 16
_BLOCK_BYTES = 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledState:
    """The states of a batch, with those of heads that share a tile side by side.

    Attributes:
        tiles: [B G Nv W], float32, for G tiles of W / Nk heads each.
        heads: number of heads; the last tile may have room for more.
        keys: key channels of a head, Nk.
    """

    # No array type: `tree.map` also builds this class from leaves that are not arrays.
    tiles: Any
    heads: int = dataclasses.field(metadata={"static": True})
    keys: int = dataclasses.field(metadata={"static": True})


def tile(state: State) -> TiledState:
    """Moves the states of heads that share a tile side by side."""
    _, heads, values, keys = state.shape
    tiles = pack_states(state, heads_per_tile(keys, values))
    return TiledState(tiles, heads, keys)


def untile(state: TiledState) -> State:
    """Inverts `tile`."""
    return unpack_states(state.tiles, heads=state.heads, keys=state.keys)


def step(
    inputs: WKVInputs, state: TiledState, live: Bool[Array, " B"] | None = None
) -> tuple[Float[Array, "B 1 H Nv"], TiledState]:
    """Computes y and the states after one token; other devices than TPUs run "scan".

    Args:
        inputs: of one token.
        state: before the token.
        live: the rows that read their token; the others' y is zero, and their states stay.
    """
    if live is not None:
        is_live = live[:, None, None, None]
        # Zeros write nothing and read zeros.
        inputs = jax.tree.map(lambda x: jnp.where(is_live, x, 0), inputs)

    def elsewhere(inputs, state):
        y, end = scan.forward(inputs, untile(state))
        return y, tile(end)

    # Programs that target a TPU may still be lowered for a CPU, where their arrays are.
    return jax.lax.platform_dependent(inputs, state, tpu=run_kernel, default=elsewhere)


def run_kernel(
    inputs: WKVInputs, state: TiledState, *, interpret: Interpret = False
) -> tuple[Float[Array, "B 1 H Nv"], TiledState]:
    """Runs the kernel; the new states may take the place of the old ones."""
    tiles = state.tiles
    batch, columns, values, width = tiles.shape
    shared = width // state.keys
    rows, groups = block(state)

    # Decays instead of their logarithms: computed here, once for all values.
    inputs = inputs._replace(log_w=jnp.exp(inputs.log_w.astype(jnp.float32)))
    no_heads = ((0, 0), (0, columns * shared - state.heads), (0, 0))
    tokens = []
    for x in inputs:
        wide = jnp.pad(x[:, 0].astype(jnp.float32), no_heads)
        # [B D], so that several rows share a tile.
        tokens.append(wide.reshape(batch, -1))

    def of_tokens(x):
        lanes = x.shape[1] // columns * groups
        return pl.BlockSpec((rows, lanes), lambda i, j: (i, j))

    of_states = pl.BlockSpec((rows, groups, values, width), lambda i, j: (i, j, 0, 0))
    y_like = output_like(tokens[3].shape, jnp.float32, *inputs, tiles)
    y, end = pl.pallas_call(
        functools.partial(_token_kernel, shared=shared, keys=state.keys),
        grid=(pl.cdiv(batch, rows), columns // groups),
        in_specs=[*map(of_tokens, tokens), of_states],
        out_specs=[of_tokens(y_like), of_states],
        out_shape=[y_like, output_like(tiles.shape, jnp.float32, *inputs, tiles)],
        input_output_aliases={len(tokens): 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel")
        ),
        interpret=interpret,
        name="wkv7_token_kernel",
    )(*tokens, tiles)
    y = y.reshape(batch, 1, -1, values)[:, :, : state.heads]
    return y.astype(inputs.v.dtype), dataclasses.replace(state, tiles=end)


def block(state: TiledState) -> tuple[int, int]:
    """Returns how many rows, and how many tiles of each, a grid step computes."""
    batch, columns, values, width = state.tiles.shape
    rows = min(batch, _ROWS)
    most = max(1, min(_TILES, _BLOCK_BYTES // (4 * values * width)) // rows)
    # The grid has no remainder.
    groups = max(n for n in range(1, columns + 1) if columns % n == 0 and n <= most)
    return rows, groups


def _token_kernel(*refs, shared: int, keys: int) -> None:
    """Writes y and the states after one token, for some rows and some of their tiles.

    Args:
        *refs: r, the decays, k, v, a, b and the states; then the outputs: y and the new states.
        shared: heads of a tile.
        keys: key channels of a head.
    """
    *token_refs, state_ref, y_ref, end_ref = refs
    rows, groups, values, _ = state_ref.shape

    def lanes(ref, group):
        width = ref.shape[1] // groups
        return slice(group * width, (group + 1) * width)

    for row in range(rows):
        for group in range(groups):
            token = []
            for ref in token_refs:
                token.append(ref[row : row + 1, lanes(ref, group)])
            y, end_ref[row, group] = _update_tile(
                WKVInputs(*token),
                state_ref[row, group],
                shared=shared,
                keys=keys,
                values=values,
            )
            y_ref[row : row + 1, lanes(y_ref, group)] = y


def _update_tile(
    token: WKVInputs,
    state: Float[Array, "Nv W"],
    *,
    shared: int,
    keys: int,
    values: int,
) -> tuple[Float[Array, "1 V"], Float[Array, "Nv W"]]:
    """Computes y and the new states of a tile's heads; the decay is in place of `log_w`."""
    r, decay, k, v, a, b = token
    key_head = _head_of_lanes((values, shared * keys), keys)
    value_lanes = (values, shared * values)
    value_head = _head_of_lanes(value_lanes, values)
    # Values are in the rows of a state, but in the lanes of v and y.
    row = iota(value_lanes, 0)
    is_own = iota(value_lanes, 1) == row + value_head * values

    # Each head's column in all of its lanes.
    def spread(columns: list[Array], head: Array) -> Array:
        wide = jnp.broadcast_to(columns[0], head.shape)
        for index in range(1, shared):
            wide = jnp.where(head == index, columns[index], wide)
        return wide

    # A column for each head. The masks keep NaN of one head out of the others.
    def sum_lanes(x: Array, head: Array) -> list[Array]:
        columns = []
        for index in range(shared):
            own = x if shared == 1 else jnp.where(head == index, x, 0.0)
            columns.append(jnp.sum(own, axis=1, keepdims=True))
        return columns

    # S <- S (diag(w) + a b^T) + v k^T, then y = S r
    removed = spread(sum_lanes(state * a, key_head), key_head)
    written = spread(sum_lanes(jnp.where(is_own, v, 0.0), value_head), key_head)
    state = state * decay + removed * b + written * k
    y = spread(sum_lanes(state * r, key_head), value_head)
    return jnp.sum(jnp.where(is_own, y, 0.0), axis=0, keepdims=True), state


def _head_of_lanes(shape: tuple[int, int], size: int) -> Array:
    """Returns the head of each lane, for heads of `size` channels."""
    # Not `//`, whose handling of signs depends on the device at lowering.
    return jax.lax.div(iota(shape, 1), size)
