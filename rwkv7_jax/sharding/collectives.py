"""Programs in which each device computes its own rows and gathers weights when it needs them.

Weights are sharded. Along `fsdp` a block's matrices are gathered when it runs, so that no device
holds more than one gathered block at a time. The transpose of the gather is a reduce-scatter, which
gives each device the gradient of its own shard. Along `tensor` nothing is gathered: a device
computes some heads and channels of a block, and their contributions to the residual stream are
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

# With more than `_FEW` devices, groups of `_NEAR` adjacent devices gather their shards first. TPU
# compilers turn a gather along three axes of a torus, and a reduce-scatter among as many devices,
# into all-reduces, which send twice as much. In two stages they keep both.
_NEAR = 4
_FEW = 8

# The mesh does not determine this: on the same mesh, a device may have whole rows.
_TIME_AXIS: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "time axis", default=None
)

# Whether `on_each` is tracing: a caller's own `jax.shard_map` may have an axis of the same name.
_ON_EACH: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "on each device", default=False
)


@struct.dataclass
class Shard:
    """One device's part of an array.

    Attributes:
        values: the part.
        axis: the sharded axis, counted from the end, since a stack over layers has another axis.
        count: the number of parts.
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
    """Tells whether a tree holds a `Shard`."""
    return any(map(_is_shard, jax.tree.leaves(tree, is_leaf=_is_shard)))


def refuse_explicit_axes(mesh: Mesh | AbstractMesh, argument: str) -> None:
    """Raises for a mesh with explicit axes, which `jax.make_mesh` makes.

    Args:
        mesh: the caller's mesh.
        argument: its name, for the message.

    Raises:
        ValueError: an axis of the type `AxisType.Explicit`.
    """
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"{argument} must have axes of type AxisType.Auto, as sharding.make_mesh makes them; "
            f"got {', '.join(kind.name for kind in mesh.axis_types)} for "
            f"{', '.join(map(str, mesh.axis_names))}."
        )


def mesh_sizes() -> dict[str, int]:
    """Returns the sizes of the mesh of the program that is traced; empty without a mesh.

    Inside `on_each` it is empty too: each device runs its own program there.

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
    """Sets the mesh axis along which the tokens of a row are sharded, for code in `on_each`."""
    token = _TIME_AXIS.set(axis)
    try:
        yield
    finally:
        _TIME_AXIS.reset(token)


def time_axis() -> str | None:
    """Returns the mesh axis along which the tokens of a row are sharded; None if they are not."""
    return _TIME_AXIS.get()


def on_each(function: Callable, *arguments: Any, takes: Any, gives: Any) -> Any:
    """Calls a function on each device with its parts of the arguments.

    Args:
        function: takes one device's parts of the arguments.
        *arguments: global arrays.
        takes: the `in_specs` of `jax.shard_map`.
        gives: its `out_specs`.
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
        # Flax's scan over layers does not keep the types that the check needs. Without it, the
        # transpose still sums over the axes that an input does not name.
        check_vma=False,
    )(*arguments)


def refuse_checked_axes(tree: Any) -> None:
    """Raises for arguments whose types name axes of a mesh.

    Args:
        tree: the arguments of a model.

    Raises:
        ValueError: an array is on a mesh with axes of the type `AxisType.Explicit`.
        TypeError: an array varies over an axis. Flax's scan over layers does not keep these types,
            so JAX would raise inside a layer, about a loop's carry.
    """
    for leaf in jax.tree.leaves(tree):
        refuse_explicit_axes(jax.typeof(leaf).sharding.mesh, "the mesh of the arrays")
        kind = getattr(jax.typeof(leaf), "manual_axis_type", None)
        if kind is not None and kind.varying:
            raise TypeError(
                "the model must be called inside `jax.shard_map(..., check_vma=False)`; got arrays "
                f"whose types vary over {', '.join(sorted(kind.varying))}."
            )


def shares_heads() -> bool:
    """Tells whether code inside `on_each` runs on a device with only some of the heads."""
    mesh = jax.sharding.get_abstract_mesh()
    return _ON_EACH.get() and mesh.shape.get(TENSOR, 1) > 1


def own_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the device's heads or channels of a weight.

    Args:
        name: path of the weight, which determines the axis of its heads or channels.
        shape: the shape of the complete weight.
    """
    parts = jax.lax.axis_size(TENSOR) if shares_heads() else 1
    spec = layout.spec(name, shape, {TENSOR: parts})
    return tuple(
        size // parts if entry == TENSOR else size
        for size, entry in zip(shape, spec, strict=True)
    )


def sum_over_heads(part: Array) -> Array:
    """Sums the results of devices with different heads or channels; else returns its argument.

    The transpose is such a sum as well. Between the two, each device has its own part of the
    gradient with respect to replicated arrays.
    """
    return jax.lax.psum(part, TENSOR) if shares_heads() else part


def as_shards(tree: Any, specs: Any) -> Any:
    """Wraps one device's sharded arrays in `Shard`, which marks them to be gathered.

    Args:
        tree: one device's arrays, inside `on_each`.
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
    # Sends the narrower of the two dtypes. Products use `dtype` in either case.
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
    """Returns the groups of devices that gather shards, for each stage; None is a group of all.

    Adjacent devices have adjacent shards, so nothing is moved afterwards. Two stages send as much
    as one.
    """
    if count <= _FEW or count % _NEAR:
        return [None]
    near = [list(range(first, first + _NEAR)) for first in range(0, count, _NEAR)]
    far = [list(range(first, count, _NEAR)) for first in range(_NEAR)]
    return [near, far]


def gather_shards(tree: Any, dtype: Any) -> Any:
    """Gathers the shards of a tree on each device, inside `on_each`.

    Args:
        tree: other arrays in it stay as they are.
        dtype: of the gathered matrices; they are sent in it if it is narrower than their own.
    """
    return jax.tree.map(
        lambda leaf: _gather(leaf, dtype) if _is_shard(leaf) else leaf,
        tree,
        is_leaf=_is_shard,
    )


def look_up(embed: Callable, tokens: Tokens, columns: Shard) -> Activations:
    """Embeds each device's tokens in a table with sharded columns, inside `on_each`.

    Each device looks up the tokens of all devices in its columns, and an all-to-all exchanges the
    results: B T D numbers are sent instead of the table.

    Args:
        embed: looks tokens up in a table.
        tokens: of this device.
        columns: of this device.
    """
    everyones = jax.lax.all_gather(tokens, FSDP, axis=0, tiled=True)
    return jax.lax.all_to_all(
        embed(everyones, columns.values), FSDP, split_axis=0, concat_axis=2, tiled=True
    )
