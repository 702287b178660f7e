"""Where arrays lie: one table from the names of parameters to the axes of a mesh.

The paths of gradients, moments and checkpoints end in the path of their parameter, so the table
holds for them as well. This module is data and rules; it runs no program on a device.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Axes of a mesh, the outermost first: devices next to each other differ in the last one.
DATA = "data"
FSDP = "fsdp"
SEQUENCE = "sequence"
TENSOR = "tensor"
AXES = (DATA, FSDP, SEQUENCE, TENSOR)

# The rows of a batch lie along these: devices that hold shards of the weights compute other rows.
# Along the third axis lie the tokens of a row, in pieces that follow each other; along the fourth
# the heads of a block, and the channels inside of its channel mix.
ROWS = (DATA, FSDP)

# The sets of a stack lie along these. A row of a set is on one device, which leaves the third axis
# without another use.
SETS = (DATA, FSDP, SEQUENCE)

# An axis of a leaf lies along one axis of the mesh, or along several, the outermost first.
_Axes = tuple[str | tuple[str, ...] | None, ...]

# A device's own heads or channels, of which each shard has some.
_OWN = (TENSOR, FSDP)

_INTO_HEADS = r"(^|/)(att/(receptance|key|value)|ffn/key)/weight"
_OUT_OF_HEADS = r"(^|/)(att/output|ffn/value)/weight"

# The end of a leaf's path, and the mesh axes of the leaf's last axes. Gathered along `fsdp` is the
# first axis of a matrix: its rows lie together in a file, and a gather along it moves nothing
# afterwards. Of the embedding it is the columns: every device looks up all tokens in its own, and
# no row travels that no token asks for. Along `tensor` nothing is gathered: what a device has there
# is all that it computes with. Leaves that no line names, such as norms and token shifts, are
# replicated.
_TABLE: tuple[tuple[re.Pattern, _Axes], ...] = (
    (re.compile(r"(^|/)emb/weight$"), (None, FSDP)),
    (re.compile(r"(^|/)head/weight(/values)?$"), (FSDP, None)),
    (re.compile(rf"{_INTO_HEADS}(/values)?$"), (_OWN, None)),
    (re.compile(rf"{_OUT_OF_HEADS}(/values)?$"), (FSDP, TENSOR)),
    # The scales of rows in 8 bits.
    (re.compile(rf"{_INTO_HEADS}/scale$"), (_OWN,)),
    (re.compile(r"/weight/scale$"), (FSDP,)),
    (re.compile(r"/att/[wavg]1$"), (FSDP, None)),
    (re.compile(r"/att/[wavg]2$"), (None, _OWN)),
    (re.compile(r"/att/([wav]0|k_k|k_a|ln_x/(weight|bias))$"), (TENSOR,)),
    (re.compile(r"/att/r_k$"), (TENSOR, None)),
    # Of states, and of what is measured of each head.
    (re.compile(r"(^|/)(wkv|upscaled/(memory|readout))$"), (TENSOR, None, None)),
    (re.compile(r"(^|/)upscaled/write$"), (TENSOR,)),
    (re.compile(r"(^|/)features/(landmarks|map)$"), (TENSOR, None, None)),
    (re.compile(r"(^|/)features/(widths|mean)$"), (TENSOR, None)),
)


class Undivided(NamedTuple):
    """A leaf that stays whole on each device because its size does not divide.

    Attributes:
        name: path of the leaf.
        size: of the axis that the table names.
        axis: of the mesh.
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
    """Returns the mesh axes of each axis of a leaf, before sizes are looked at."""
    for pattern, axes in _TABLE:
        if ndim >= len(axes) and pattern.search(name):
            return [()] * (ndim - len(axes)) + [axes_of(entry) for entry in axes]
    return [()] * ndim


def _divide(
    size: int, axes: tuple[str, ...], sizes: Mapping[str, int]
) -> tuple[list[str], list[str]]:
    """Returns the mesh axes of more than one device that divide a size, and those that do not."""
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
    """Returns how a leaf is sharded; a mesh axis that does not divide its size is dropped.

    Args:
        name: path of the leaf.
        shape: of the whole array.
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
    """Returns a tree of the `spec` of each leaf; leaves are arrays, tracers or shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: spec(path_name(path), leaf.shape, sizes), tree
    )


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns a tree of the sharding of each leaf; leaves are arrays, tracers or shapes."""
    return jax.tree.map(
        lambda one: NamedSharding(mesh, one),
        specs(mesh.shape, tree),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def is_abstract(tree: Any) -> bool:
    """Tells whether a tree describes arrays that are not there."""
    leaves = jax.tree.leaves(tree)
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def abstract_shards(mesh: Mesh | None, tree: Any) -> Any:
    """Describes the arrays of a tree with their shardings; without a mesh, as they are.

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
    """Describes the arrays of a batch with their shardings; without a mesh, as they are."""

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
    """Returns the mesh axes that share the tokens of a row outside of the blocks.

    There, devices that share heads in the blocks have all of a row: they take a piece of it each,
    so that the head is computed once. Tokens that an axis does not divide it does not share.
    """
    kept, _ = _divide(tokens, (SEQUENCE, TENSOR), sizes)
    return tuple(kept) or None


def row_axes(rows: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes that share rows: as many devices as divide them evenly.

    Rows that no axis divides are computed by every device.
    """
    for axes in (ROWS, (FSDP,), (DATA,)):
        count = 1
        for axis in axes:
            count *= sizes.get(axis, 1)
        if count > 1 and rows % count == 0:
            return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
    return ()


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Returns how an array of so many rows is sharded."""
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
    """Counts the sets of a stack that one device updates; they need not be divided evenly."""
    return -(-sets // math.prod(sizes.get(axis, 1) for axis in SETS))
