"""The placement of arrays: one table from the names of parameters to the axes of a mesh.

The paths of gradients, moments and checkpoints end with the path of their parameter, so the table
applies to them as well. This module runs no program on a device.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Axes of a mesh, outermost first: adjacent devices differ in the last one.
DATA = "data"
FSDP = "fsdp"
SEQUENCE = "sequence"
TENSOR = "tensor"
AXES = (DATA, FSDP, SEQUENCE, TENSOR)

# The axes of the rows of a batch: devices with different shards of the weights compute different
# rows. The third axis of a mesh shards the tokens of a row into consecutive pieces; the fourth, the
# heads of a block and the channels inside its channel mix.
ROWS = (DATA, FSDP)

# The axes of the sets of a stack. A row of a set is on one device, so the third axis is free.
SETS = (DATA, FSDP, SEQUENCE)

# For each axis of a leaf, the axis of the mesh, or several of them, outermost first.
_Axes = tuple[str | tuple[str, ...] | None, ...]

# Heads or channels are split along `tensor`, and each device's part is sharded along `fsdp`.
_OWN = (TENSOR, FSDP)

_INTO_HEADS = r"(^|/)(att/(receptance|key|value)|ffn/key)/weight"
_OUT_OF_HEADS = r"(^|/)(att/output|ffn/value)/weight"

# The end of a leaf's path, and the mesh axes of the leaf's last axes.
#
# * Along `fsdp`, the first axis of a matrix is sharded: its rows are contiguous in a file, and a
#   gather along it needs no transposition. The embedding is sharded by columns: every device looks
#   up all tokens in its columns, so rows of unused tokens are never sent.
# * Along `tensor`, nothing is gathered: a device computes only with its part.
# * Leaves without a line, such as norms and token shifts, are replicated.
_TABLE: tuple[tuple[re.Pattern, _Axes], ...] = (
    (re.compile(r"(^|/)emb/weight$"), (None, FSDP)),
    (re.compile(r"(^|/)head/weight(/values)?$"), (FSDP, None)),
    (re.compile(rf"{_INTO_HEADS}(/values)?$"), (_OWN, None)),
    (re.compile(rf"{_OUT_OF_HEADS}(/values)?$"), (FSDP, TENSOR)),
    # The scales of 8-bit rows.
    (re.compile(rf"{_INTO_HEADS}/scale$"), (_OWN,)),
    (re.compile(r"/weight/scale$"), (FSDP,)),
    (re.compile(r"/att/[wavg]1$"), (FSDP, None)),
    (re.compile(r"/att/[wavg]2$"), (None, _OWN)),
    (re.compile(r"/att/([wav]0|k_k|k_a|ln_x/(weight|bias))$"), (TENSOR,)),
    (re.compile(r"/att/r_k$"), (TENSOR, None)),
    # States and statistics of heads.
    (re.compile(r"(^|/)(wkv|upscaled/(memory|readout))$"), (TENSOR, None, None)),
    (re.compile(r"(^|/)upscaled/write$"), (TENSOR,)),
    (re.compile(r"(^|/)features/(landmarks|map)$"), (TENSOR, None, None)),
    (re.compile(r"(^|/)features/(widths|mean)$"), (TENSOR, None)),
)


class Undivided(NamedTuple):
    """A leaf that is replicated because a mesh axis does not divide its size.

    Attributes:
        name: path of the leaf.
        size: of the leaf's axis.
        axis: the mesh axis.
    """

    name: str
    size: int
    axis: str


def path_name(path: tuple) -> str:
    """Joins a leaf's path into one string, such as "params/layers/att/w1"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a `PartitionSpec`."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else entry


def _axes(name: str, ndim: int) -> list[tuple[str, ...]]:
    """Returns the mesh axes of each axis of a leaf, regardless of sizes."""
    for pattern, axes in _TABLE:
        if ndim >= len(axes) and pattern.search(name):
            return [()] * (ndim - len(axes)) + [axes_of(entry) for entry in axes]
    return [()] * ndim


def _divide(
    size: int, axes: tuple[str, ...], sizes: Mapping[str, int]
) -> tuple[list[str], list[str]]:
    """Returns the mesh axes that divide a size, and those that do not; omits axes of size 1."""
    kept = []
    dropped = []
    parts = 1
    for axis in axes:
        count = sizes.get(axis, 1)
        if count == 1:
            continue
        if size % (parts * count):
            dropped.append(axis)
        else:
            kept.append(axis)
            parts *= count
    return kept, dropped


def spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """Returns the spec of a leaf, without mesh axes that do not divide its size.

    Args:
        name: path of the leaf.
        shape: of the global array.
        sizes: of the mesh's axes, by name.
    """
    entries: list[str | tuple[str, ...] | None] = []
    for axes, size in zip(_axes(name, len(shape)), shape, strict=True):
        kept, _ = _divide(size, axes, sizes)
        if len(kept) > 1:
            entries.append(tuple(kept))
        else:
            entries.append(kept[0] if kept else None)
    return PartitionSpec(*entries)


def specs(sizes: Mapping[str, int], tree: Any) -> Any:
    """Maps a tree of arrays, tracers or shapes to the `spec` of each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: spec(path_name(path), leaf.shape, sizes), tree
    )


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Maps a tree of arrays, tracers or shapes to the sharding of each leaf."""
    return jax.tree.map(lambda one: NamedSharding(mesh, one), specs(mesh.shape, tree))


def is_abstract(tree: Any) -> bool:
    """Tells whether a tree holds a `jax.ShapeDtypeStruct`."""
    leaves = jax.tree.leaves(tree)
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def abstract_shards(mesh: Mesh | None, tree: Any) -> Any:
    """Describes the arrays of a tree with their shardings; without a mesh, without shardings.

    The devices of the mesh need not exist: a program can be compiled for the description.
    """
    if mesh is None:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree
        )
    return jax.tree.map(
        lambda leaf, one: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one),
        tree,
        shardings(mesh, tree),
    )


def abstract_rows(mesh: Mesh | None, batch: Any) -> Any:
    """Describes the arrays of a batch with their shardings; without a mesh, without shardings."""

    def describe(values: Any) -> jax.ShapeDtypeStruct:
        rows = None if mesh is None else row_sharding(mesh, values.shape[0])
        return jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=rows)

    return jax.tree.map(describe, batch)


def undivided(mesh: Mesh, tree: Any) -> list[Undivided]:
    """Lists the leaves that the table would shard but whose sizes the mesh does not divide."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        for axes, size in zip(_axes(name, len(leaf.shape)), leaf.shape, strict=True):
            _, dropped = _divide(size, axes, mesh.shape)
            for axis in dropped:
                found.append(Undivided(name, size, axis))
    return found


def token_axes(tokens: int, sizes: Mapping[str, int]) -> tuple[str, ...] | None:
    """Returns the mesh axes over which the tokens of a row are sharded outside the blocks.

    Devices that shard the heads inside the blocks have whole rows. Outside, each takes a part of
    the row, so that the output head is computed once. Axes that do not divide the tokens are
    omitted.
    """
    kept, _ = _divide(tokens, (SEQUENCE, TENSOR), sizes)
    return tuple(kept) or None


def row_axes(rows: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes over which rows are sharded: the first choice that divides them.

    If none does, every device computes all rows.
    """
    for axes in (ROWS, (FSDP,), (DATA,)):
        count = math.prod(sizes.get(axis, 1) for axis in axes)
        if count > 1 and rows % count == 0:
            return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
    return ()


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Returns the sharding of an array with this number of rows."""
    return NamedSharding(mesh, PartitionSpec(row_axes(rows, mesh.shape) or None))


def share_of_rows(rows: int, sizes: Mapping[str, int]) -> int:
    """Counts the rows of a batch that one device computes."""
    return rows // math.prod(sizes[axis] for axis in row_axes(rows, sizes))


def filled_rows(rows: int, sizes: Mapping[str, int]) -> int:
    """Counts rows with those that fill them up, so that all devices have equally many of their own.

    For programs that compute each row by itself, and leave the results of the others out.
    """
    count = math.prod(sizes.get(axis, 1) for axis in ROWS)
    return -(-rows // count) * count


def share_of_sets(sets: int, sizes: Mapping[str, int]) -> int:
    """Counts the sets of a stack that one device updates, rounded up."""
    return -(-sets // math.prod(sizes.get(axis, 1) for axis in SETS))
