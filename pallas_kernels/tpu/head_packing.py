"""What a TPU kernel's tiles hold and how heads share them."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


class TileLayout(NamedTuple):
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


def iota(shape: tuple[int, int], axis: int) -> Array:
    """Each entry's index along an axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def make_masks(form: TileLayout) -> Masks:
    """The masks of a kernel, by bits: chunks are powers of two, and heads begin at multiples."""
    square = (form.rows, form.rows)
    row, column = iota(square, 0), iota(square, 1)
    differing, merges, block = row ^ column, [], 1
    while block < form.chunk:
        # The lower left quarter of each pair of blocks on the diagonal.
        merges.append((differing < 2 * block) & (row & block != 0) & (column & block == 0))
        block *= 2
    same = differing < form.chunk
    state = (form.heads * form.values, form.heads * form.keys)

    def head(shape: tuple[int, int], axis: int, size: int) -> Array:
        # Not `//`, whose signs need to know the device at lowering.
        return jax.lax.div(iota(shape, axis), size)

    return Masks(
        strict=same & (row > column),
        lower=same & (row >= column),
        merges=tuple(merges),
        blocks=head(state, 0, form.values) == head(state, 1, form.keys),
        key_head=head((form.chunk, state[1]), 1, form.keys),
        value_head=head((form.chunk, state[0]), 1, form.values),
    )


def dot(x: Array, y: Array, *, left: int = 1, right: int = 0) -> Array:
    """The product over axis `left` of x and `right` of y, summed in float32."""
    precision = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    axes = (((left,), (right,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def sums(signs: Array, x: Array, form: TileLayout) -> Array:
    """signs @ x for entries of -1, 0, 1: exact products, in two halves of 8 bits for bfloat16."""
    if form.dtype != jnp.bfloat16:
        return dot(signs, x)
    # By bits: a cast there and back is something that compilers like to drop.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    signs = signs.astype(jnp.bfloat16)
    halves = jnp.concatenate([high, x - high], 0).astype(jnp.bfloat16)
    return dot(jnp.concatenate([signs, signs], 1), halves)


def stack(x: Array, head: Array, form: TileLayout) -> Array:
    """The rows of each head one above the other, without the other heads' lanes."""
    parts = [jnp.where(head == h, x, 0.0) for h in range(form.heads)] if form.heads > 1 else [x]
    return jnp.concatenate(parts, 0).astype(form.dtype)


def repeat(x: Array, form: TileLayout) -> Array:
    """The rows once for each head, all lanes; products with a stack leave the right ones."""
    return jnp.concatenate([x.astype(form.dtype)] * form.heads, 0)


def unstack(x: Array, head: Array, form: TileLayout) -> Array:
    """From each head's rows that head's lanes: the inverse of `stack`, blind to other lanes."""
    out = x[: form.chunk]
    for h in range(1, form.heads):
        out = jnp.where(head == h, x[h * form.chunk : (h + 1) * form.chunk], out)
    return out


def expand(x: Array, masks: Masks, form: TileLayout) -> Array:
    """[Nv, heads*Nk] as a block-diagonal matrix."""
    return jnp.where(masks.blocks, jnp.concatenate([x] * form.heads, 0), 0.0)


def compact(x: Array, form: TileLayout) -> Array:
    """The inverse of `expand`."""
    return sum(x[h * form.values : (h + 1) * form.values] for h in range(form.heads))


def interleave(groups: list[Iterator]) -> None:
    """Every group's next stage before any group's second next: the scheduler mixes them."""
    while groups:
        groups = [group for group in groups if next(group, StopIteration) is not StopIteration]


def load(refs, g: int, form: TileLayout) -> list[Array]:
    """Group g's lanes of each block, in float32."""
    sizes = (form.keys,) * 3 + (form.values,) + (form.keys,) * 2 + (form.values,)
    widths = [form.heads * size for size in sizes[: len(refs)]]
    return [
        ref[0, :, g * width : (g + 1) * width].astype(jnp.float32)
        for ref, width in zip(refs, widths, strict=True)
    ]


def store(ref, g: int, x: Array) -> None:
    """Write group g's lanes of a block, in its dtype."""
    ref[0, :, g * x.shape[1] : (g + 1) * x.shape[1]] = x.astype(ref.dtype)
