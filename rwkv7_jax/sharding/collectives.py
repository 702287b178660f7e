"""Programs in which each device computes its own rows, and weights meet where they are needed.

Weights lie in shards. Along `fsdp` a block's matrices are gathered when it runs, so that no device
holds more than one block of them at a time; the transpose of the gather is the reduce-scatter that
leaves each device the gradient of its own shard. Along `tensor` they are never gathered: a device
computes some of the heads and channels of a block, and what they add to the residual stream is
summed.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array

from rwkv7_jax.array_types import Activations, Tokens
from rwkv7_jax.sharding import layout
from rwkv7_jax.sharding.layout import FSDP, TENSOR

# Devices next to each other that put their shards together first, and of how many in all. TPUs'
# compilers know no gather along three axes of a torus, and no reduce-scatter among as many devices:
# they make all-reduces of them, which send twice as much. In two stages they keep both.
_NEAR = 4
_FEW = 8

# Not asked of the mesh: on the same one, a device may also have rows of its own.
_TIME_AXIS: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "time axis", default=None
)

# Whether `on_each` traces: a `jax.shard_map` of the caller's own may have an axis of the same name.
_ON_EACH: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "on each device", default=False
)


@struct.dataclass
class Shard:
    """One device's part of an array.

    Attributes:
        values: the part.
        axis: along which the parts follow each other, from the end: a stack over layers may have
            an axis more.
        count: of the parts.
    """

    values: Any
    axis: int = struct.field(pytree_node=False)
    count: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""
        shape = list(self.values.shape)
        shape[self.axis] *= self.count
        return tuple(shape)


def _is_shard(node: Any) -> bool:
    return isinstance(node, Shard)


def has_shards(tree: Any) -> bool:
    """Tells whether a tree holds parts of arrays."""
    return any(map(_is_shard, jax.tree.leaves(tree, is_leaf=_is_shard)))


def refuse_explicit_axes(mesh: Mesh | AbstractMesh, argument: str) -> None:
    """Refuses a mesh whose axes are part of the arrays' types, as `jax.make_mesh` makes them.

    Args:
        mesh: of a caller.
        argument: its name, for the message.

    Raises:
        ValueError: an axis of the type `AxisType.Explicit`.
    """
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"{argument} must have axes that the compiler partitions, as those of "
            "sharding.make_mesh are (AxisType.Auto); got "
            f"{', '.join(kind.name for kind in mesh.axis_types)} for "
            f"{', '.join(map(str, mesh.axis_names))}."
        )


def mesh_sizes() -> dict[str, int]:
    """Returns the sizes of the mesh that the program being traced is shared by; empty if none.

    Inside of `on_each` there is none: there a program sees its own device alone.

    Raises:
        ValueError: a mesh with axes of the type `AxisType.Explicit`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    refuse_explicit_axes(mesh, "the mesh of the program")
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(kinds.get(axis) == AxisType.Manual for axis in layout.AXES):
        return {}
    sizes = {axis: mesh.shape[axis] for axis in layout.AXES if axis in kinds}
    return sizes if any(size > 1 for size in sizes.values()) else {}


@contextlib.contextmanager
def tokens_along(axis: str | None) -> Iterator[None]:
    """Says, to what is traced inside of `on_each`, along which axis the tokens of a row lie."""
    token = _TIME_AXIS.set(axis)
    try:
        yield
    finally:
        _TIME_AXIS.reset(token)


def time_axis() -> str | None:
    """Returns the axis along which the tokens of a row lie; None if each device has all of them."""
    return _TIME_AXIS.get()


def on_each(function: Callable, *arguments: Any, takes: Any, gives: Any) -> Any:
    """Calls a function on each device with its parts of the arguments.

    Args:
        function: of the parts.
        *arguments: whole arrays, as the program around sees them.
        takes: a `PartitionSpec` for each argument, or trees of them.
        gives: the same of the results.
    """
    if not mesh_sizes():
        return function(*arguments)

    def on_device(*parts: Any) -> Any:
        token = _ON_EACH.set(True)
        try:
            return function(*parts)
        finally:
            _ON_EACH.reset(token)

    return jax.shard_map(
        on_device,
        in_specs=takes,
        out_specs=gives,
        # Flax scans over layers without the types that the check needs. The transpose sums over
        # the axes that an input does not name all the same.
        check_vma=False,
    )(*arguments)


def refuse_checked_axes(tree: Any) -> None:
    """Refuses arguments whose types speak of a mesh's axes.

    Args:
        tree: the arguments of a model.

    Raises:
        ValueError: an array lies on a mesh with axes of the type `AxisType.Explicit`.
        TypeError: an array varies over an axis. Flax scans over layers without these types, so JAX
            would raise in the middle of a layer, about a loop's carry.
    """
    for leaf in jax.tree.leaves(tree):
        refuse_explicit_axes(jax.typeof(leaf).sharding.mesh, "the mesh of the arrays")
        kind = getattr(jax.typeof(leaf), "manual_axis_type", None)
        if kind is not None and kind.varying:
            raise TypeError(
                "the model must be called inside `jax.shard_map(..., check_vma=False)`; got one "
                f"that checks which arrays vary over {', '.join(sorted(kind.varying))}."
            )


def shares_heads() -> bool:
    """Tells, to what is traced inside of `on_each`, whether a device has only some of the heads."""
    if not _ON_EACH.get():
        return False
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return kinds.get(TENSOR) == AxisType.Manual and mesh.shape[TENSOR] > 1


def own_part(name: str, whole: Array) -> Array:
    """Returns the heads or channels of a weight that a device has; all of them elsewhere.

    Args:
        name: path of the weight, which says along which axis they lie.
        whole: the weight.
    """
    if not shares_heads():
        return whole
    sizes = {TENSOR: jax.lax.axis_size(TENSOR)}
    for axis, entry in enumerate(layout.spec(name, whole.shape, sizes)):
        if entry == TENSOR:
            size = whole.shape[axis] // sizes[TENSOR]
            first = size * jax.lax.axis_index(TENSOR)
            return jax.lax.dynamic_slice_in_dim(whole, first, size, axis)
    return whole


def sum_over_heads(part: Array) -> Array:
    """Adds up what devices with other heads or channels computed; elsewhere it is the sum already.

    The transpose is such a sum as well. Between the two, each device has its own part of the
    gradient with respect to what all of them have.
    """
    return jax.lax.psum(part, TENSOR) if shares_heads() else part


def as_shards(tree: Any, specs: Any) -> Any:
    """Marks which arrays of a device are to be gathered, so that they are not taken for whole ones.

    Args:
        tree: one device's arrays, inside of `on_each`.
        specs: of each array.
    """

    def mark(values: Array, spec: PartitionSpec) -> Any:
        for axis, entry in enumerate(spec):
            if FSDP in layout.axes_of(entry):
                return Shard(
                    values=values,
                    axis=axis - values.ndim,
                    count=jax.lax.axis_size(FSDP),
                )
        return values

    return jax.tree.map(mark, tree, specs)


@jax.named_scope("gather_shards")
def _gather(shard: Shard, dtype: Any) -> Array:
    values = shard.values
    # The narrower of the two dtypes travels. Products are taken in `dtype` in any case.
    is_float = jnp.issubdtype(values.dtype, jnp.floating)
    if is_float and values.dtype.itemsize > jnp.dtype(dtype).itemsize:
        values = values.astype(dtype)
    axis = values.ndim + shard.axis
    for groups in _stages(shard.count):
        values = jax.lax.all_gather(
            values, FSDP, axis=axis, tiled=True, axis_index_groups=groups
        )
    if is_float and values.ndim > 1:
        values = values.astype(dtype)
    return values


def _stages(count: int) -> list[list[list[int]] | None]:
    """Returns the groups of devices among which shards are gathered, one stage after the other.

    Shards of devices next to each other follow each other, so that nothing is moved afterwards. Two
    stages send as much as one. None is the group of all.
    """
    if count <= _FEW or count % _NEAR:
        return [None]
    near = [list(range(first, first + _NEAR)) for first in range(0, count, _NEAR)]
    far = [list(range(first, count, _NEAR)) for first in range(_NEAR)]
    return [near, far]


def gather_shards(tree: Any, dtype: Any) -> Any:
    """Makes the parts in a tree whole, on each device; inside of `on_each`.

    Args:
        tree: whole arrays stay as they are.
        dtype: that matrices are used in, and gathered in where it is narrower than theirs.
    """
    return jax.tree.map(
        lambda leaf: _gather(leaf, dtype) if _is_shard(leaf) else leaf,
        tree,
        is_leaf=_is_shard,
    )


def look_up(embed: Callable, tokens: Tokens, columns: Shard) -> Activations:
    """Embeds each device's tokens in a table whose columns lie in shards; inside of `on_each`.

    The tokens of all devices are looked up in the columns of each, and the results change places:
    B T D numbers travel in place of the table.

    Args:
        embed: looks tokens up in a table.
        tokens: of this device.
        columns: of this device.
    """
    everyones = jax.lax.all_gather(tokens, FSDP, axis=0, tiled=True)
    return jax.lax.all_to_all(
        embed(everyones, columns.values), FSDP, split_axis=0, concat_axis=2, tiled=True
    )
