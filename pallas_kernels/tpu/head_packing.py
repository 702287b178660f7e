"""Packing of heads into the tiles of a TPU kernel: sizes, masks and conversions.

Small heads share a tile. With two heads of 64, a token's 128 lanes hold both heads. The rows of the
two heads are stacked, each with the other head's lanes zeroed, and the state is block diagonal.
Every product is then a full tile, and the heads never mix.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.reference import State

LANES = 128


class TileLayout(NamedTuple):
    """Sizes of one kernel.

    Attributes:
        chunk: tokens of a chunk (L).
        heads: heads that share a tile.
        keys: key channels of a head.
        values: value channels of a head.
        groups: tiles that share a grid step.
        dtype: of the operands of matrix products.
    """

    chunk: int
    heads: int
    keys: int
    values: int
    groups: int
    dtype: jnp.dtype

    @property
    def rows(self) -> int:
        """Rows of a stack (R): all tokens of all heads of a tile."""
        return self.heads * self.chunk


class Masks(NamedTuple):
    """Masks that all groups of a grid step share.

    Attributes:
        strict: [R R], the column is the same head's earlier token.
        lower: [R R], the column is the same head's earlier or same token.
        merges: [R R] each, the blocks that one level of the inverse fills.
        blocks: [heads*Nv heads*Nk], the diagonal blocks of the state.
        key_head: [L heads*Nk], the head that a lane of keys belongs to.
        value_head: [L heads*Nv], the head that a lane of values belongs to.
    """

    strict: Array
    lower: Array
    merges: tuple[Array, ...]
    blocks: Array
    key_head: Array
    value_head: Array


def heads_per_tile(keys: int, values: int) -> int:
    """Returns the smallest number of heads whose keys and values both fill whole lanes."""
    return math.lcm(LANES // math.gcd(LANES, keys), LANES // math.gcd(LANES, values))


def pack_states(state: State, shared: int) -> Float[Array, "B G Nv W"]:
    """Puts the states of the heads that share a tile side by side."""
    state = jnp.pad(state, ((0, 0), (0, -state.shape[1] % shared), (0, 0), (0, 0)))
    batch, heads, values, keys = state.shape
    state = state.reshape(batch, heads // shared, shared, values, keys)
    # [B G heads Nv Nk] to [B G Nv heads*Nk].
    return state.swapaxes(2, 3).reshape(batch, -1, values, shared * keys)


def unpack_states(packed: Float[Array, "B G Nv W"], *, heads: int, keys: int) -> State:
    """Inverts `pack_states` for `heads` heads with `keys` key channels each."""
    batch, columns, values, width = packed.shape
    state = packed.reshape(batch, columns, values, width // keys, keys).swapaxes(2, 3)
    return state.reshape(batch, -1, values, keys)[:, :heads]


def iota(shape: tuple[int, int], axis: int) -> Array:
    """Returns each entry's index along an axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def make_masks(layout: TileLayout) -> Masks:
    """Computes the masks of a kernel from bits: chunks are aligned powers of two."""
    square = (layout.rows, layout.rows)
    row = iota(square, 0)
    column = iota(square, 1)
    differing = row ^ column
    merges = []
    block = 1
    while block < layout.chunk:
        # The lower left quarter of each pair of blocks on the diagonal.
        merges.append(
            (differing < 2 * block) & (row & block != 0) & (column & block == 0)
        )
        block *= 2
    # A head's rows are an aligned run of a power of two: their indices differ only in low bits.
    same_head = differing < layout.chunk
    state = (layout.heads * layout.values, layout.heads * layout.keys)

    def head(shape: tuple[int, int], axis: int, size: int) -> Array:
        # Not `//`, whose handling of signs depends on the device at lowering.
        return jax.lax.div(iota(shape, axis), size)

    return Masks(
        strict=same_head & (row > column),
        lower=same_head & (row >= column),
        merges=tuple(merges),
        blocks=head(state, 0, layout.values) == head(state, 1, layout.keys),
        key_head=head((layout.chunk, state[1]), 1, layout.keys),
        value_head=head((layout.chunk, state[0]), 1, layout.values),
    )


def stack(x: Array, head: Array, layout: TileLayout) -> Array:
    """Stacks the rows of the heads with other heads' lanes zeroed: [L W] to [R W]."""
    parts = [x]
    if layout.heads > 1:
        parts = [jnp.where(head == h, x, 0.0) for h in range(layout.heads)]
    return jnp.concatenate(parts, 0).astype(layout.dtype)


def repeat(x: Array, layout: TileLayout) -> Array:
    """Repeats the rows once per head, with all lanes: [L W] to [R W].

    In a product with a stack only the lanes of the row's own head count, because the stack has
    zeros in the others.
    """
    return jnp.concatenate([x.astype(layout.dtype)] * layout.heads, 0)


def unstack(x: Array, head: Array, layout: TileLayout) -> Array:
    """Inverts `stack`: takes each head's lanes from that head's rows."""
    chunk = layout.chunk
    out = x[:chunk]
    for h in range(1, layout.heads):
        out = jnp.where(head == h, x[h * chunk : (h + 1) * chunk], out)
    return out


def expand(x: Array, masks: Masks, layout: TileLayout) -> Array:
    """Makes a block-diagonal matrix [heads*Nv heads*Nk] from states side by side [Nv heads*Nk]."""
    return jnp.where(masks.blocks, jnp.concatenate([x] * layout.heads, 0), 0.0)


def compact(x: Array, layout: TileLayout) -> Array:
    """Inverts `expand`."""
    values = layout.values
    # Each column has one nonzero block.
    blocks = (x[h * values : (h + 1) * values] for h in range(layout.heads))
    return sum(blocks)  # pyright: ignore[reportReturnType]
