"""The mesh of a program's devices, and the placement of arrays on it."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from rwkv7_jax.sharding import layout
from rwkv7_jax.sharding.arrangement import arrange
from rwkv7_jax.sharding.collectives import mesh_sizes, refuse_explicit_axes
from rwkv7_jax.sharding.layout import AXES, DATA, FSDP, SEQUENCE, TENSOR

# Lets `make_mesh` choose the sizes.
AUTO = "auto"

# Maximum number of digits of an axis size.
_MOST_DIGITS = 9

# The axes that share one copy of the weights, or one row.
_INNER = (FSDP, SEQUENCE, TENSOR)


def make_mesh(
    choice: str | Mapping[str, int],
    rows: int,
    devices: Sequence[Any] | None = None,
    *,
    are_sets: bool = False,
) -> Mesh | None:
    """Makes the mesh of a run; None for a single device.

    Args:
        choice: the sizes of `data`, `fsdp`, `sequence` and `tensor` by name, also as a text such as
            "data=2,fsdp=4"; or "auto": rows sharded over as many devices as divide them evenly, and
            weights replicated.
        rows: of a step, or the sets of a stack.
        devices: all by default.
        are_sets: whether `rows` counts sets, which need not be divided evenly.

    Raises:
        ValueError: an unknown axis, a size that is not a positive integer, both `sequence` and
            `tensor`, more devices than there are, or fewer than those of all processes; or "auto"
            with several processes whose devices do not divide the rows evenly.
    """
    devices = list(jax.devices() if devices is None else devices)
    if isinstance(choice, str):
        choice = parse_sizes(choice, "`config.mesh`")
    if isinstance(choice, Mapping):
        _check_sizes(choice, "`config.mesh`", dict(choice))
        sizes = {axis: choice.get(axis, 1) for axis in AXES}
        if math.prod(sizes.values()) > len(devices):
            raise ValueError(
                f"`config.mesh` must have at most {len(devices)} devices, as many as there are; "
                f"got {_described(sizes)}."
            )
    else:
        share = _devices_for_sets if are_sets else _devices_for_rows
        sizes = {**dict.fromkeys(AXES, 1), DATA: share(rows, devices)}
    count = math.prod(sizes.values())
    processes = _processes(devices)
    if processes > 1 and count < len(devices):
        raise ValueError(
            f"`config.mesh` must have all {len(devices)} devices of all {processes} processes; "
            f"got {_described(sizes)}."
        )
    if count == 1:
        return None
    return Mesh(
        arrange(sizes, devices[:count]),
        AXES,
        # The compiler partitions a program that is written for one device.
        axis_types=(AxisType.Auto,) * len(AXES),
    )


def stack_mesh(mesh: Mesh | None, sets: int) -> Mesh | None:
    """Returns the mesh over which the sets of a stack are sharded.

    With sharded weights or several processes it is the mesh of the weights; otherwise a mesh that
    suits the number of sets.

    Args:
        mesh: of the weights.
        sets: the number of sets.
    """
    if mesh is not None and (mesh.shape[FSDP] > 1 or mesh.is_multi_process):
        return mesh
    return make_mesh(AUTO, sets, are_sets=True)


def sizes_of(mesh: Mesh | None) -> Mapping[str, int]:
    """Returns the sizes of a mesh's axes, by name; none for a single device."""
    return {} if mesh is None else mesh.shape


def _processes(devices: Sequence[Any]) -> int:
    return len({device.process_index for device in devices})


def _described(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def _devices_for_rows(rows: int, devices: Sequence[Any]) -> int:
    """Returns the number of devices over which a step's rows are sharded."""
    count = len(devices)
    # Fewer devices instead of padded rows, which every loss and metric would have to exclude.
    while rows % count:
        count -= 1
    processes = _processes(devices)
    if processes > 1 and count < len(devices):
        raise ValueError(
            f"a step's {rows} rows must be a multiple of the {len(devices)} devices of "
            f"{processes} processes; change `config.data.batch_size`, "
            "`config.optimizer.accumulate` or, at test time, `config.test_time.prompts`."
        )
    return count


def _devices_for_sets(sets: int, devices: Sequence[Any]) -> int:
    """Returns the smallest number of devices with the minimum number of sets per device."""
    if _processes(devices) > 1:
        return len(devices)
    of_one = -(-sets // len(devices))
    return -(-sets // of_one)


def place(mesh: Mesh | None, tree: Any) -> Any:
    """Places the arrays of a tree by the layout; without a mesh, on the first local device.

    Arrays that are placed already are not copied. With several processes, each has all arrays and
    places its own shards. Shapes get shardings, so that a step can be compiled for absent devices.
    """
    # Without an array, the devices of a mesh need not exist.
    if not jax.tree.leaves(tree) or layout.is_abstract(tree):
        return layout.abstract_shards(mesh, tree)
    if mesh is None:
        return jax.device_put(tree, jax.local_devices()[0])
    if is_shared(mesh):
        return jax.tree.map(_put_own_shards, tree, layout.shardings(mesh, tree))
    own = local_mesh(mesh)
    placed = jax.device_put(tree, layout.shardings(own or mesh, tree))
    if own is mesh:
        return placed
    return jax.tree.map(lambda leaf: _on_mesh(mesh, leaf), placed)


def _put_own_shards(leaf: Any, sharding: NamedSharding) -> Array:
    """Places an array over several processes, each of which has the array or its shards."""
    if is_spread(leaf):
        return jax.device_put(leaf, sharding)
    # `device_put` would first compare the array between all processes.
    array = np.asarray(leaf)
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index]
    )


def to_host(tree: Any) -> Any:
    """Returns the arrays of a tree as NumPy arrays.

    Arrays that are sharded over several processes are gathered first, so all processes must call
    this.
    """

    def gather(leaf: Any) -> Any:
        if is_spread(leaf) and not leaf.is_fully_replicated:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return leaf

    # One transfer for all arrays, since each transfer waits for the device.
    return jax.device_get(jax.tree.map(gather, tree))


def is_spread(leaf: Any) -> bool:
    """Tells whether an array is on devices of several processes."""
    return not getattr(leaf, "is_fully_addressable", True)


def _on_mesh(mesh: Mesh, leaf: Array) -> Array:
    """Makes an array on a mesh from the shards of an array on this process's devices."""
    return jax.make_array_from_single_device_arrays(
        leaf.shape,
        NamedSharding(mesh, cast(NamedSharding, leaf.sharding).spec),
        [shard.data for shard in leaf.addressable_shards],
    )


def bytes_on_a_device(tree: Any) -> int:
    """Counts the bytes of a tree's arrays on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total += leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    return total


def parse_sizes(text: str, argument: str) -> str | dict[str, int]:
    """Parses the sizes of a mesh, such as "data=2,fsdp=4", or "auto".

    Args:
        text: of a setting or a command line.
        argument: its name in backticks, for messages.

    Raises:
        ValueError: an unknown axis, a size that is not a positive integer, or both `sequence` and
            `tensor`.
    """
    if text == AUTO:
        return AUTO
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        # A repeated axis, or a size that is not a number, becomes 0, which is rejected below.
        # Python does not parse numbers of thousands of digits.
        is_count = size.isdecimal() and len(size) <= _MOST_DIGITS
        sizes[axis] = int(size) if is_count and axis not in sizes else 0
    _check_sizes(sizes, argument, text)
    return sizes


def _check_sizes(sizes: Mapping[str, int], argument: str, got: Any) -> None:
    """Raises unless sizes of axes are positive integers that can be used together."""
    for axis, size in sizes.items():
        is_count = isinstance(size, int | np.integer) and size > 0
        if axis not in AXES or not is_count:
            raise ValueError(
                f"{argument} must be {AUTO}, or sizes of {', '.join(AXES)} such as fsdp=8; "
                f"got {got!r:.100}."
            )
    if sizes.get(SEQUENCE, 1) > 1 and sizes.get(TENSOR, 1) > 1:
        raise ValueError(
            f"{argument} must shard rows along {SEQUENCE} or heads along {TENSOR}, not both; "
            f"got {got!r}."
        )


def check_shared_heads(config: Any, parts: int, argument: str) -> None:
    """Checks that the heads of a model can be sharded.

    Args:
        config: the model's configuration.
        parts: the number of devices that share them.
        argument: the argument in backticks; the message begins with it.

    Raises:
        ValueError: they do not divide the heads, or the channels inside the channel mix.
    """
    if config.num_heads % parts or config.ffn_width % parts:
        raise ValueError(
            f"{argument} must have a size of `tensor` that divides the model's {config.num_heads} "
            f"heads and the {config.ffn_width} channels of its channel mix; got {parts}."
        )


def is_shared(mesh: Mesh | None) -> bool:
    """Tells whether a weight is sharded over several processes.

    Then only all processes together can compute with the weights.
    """
    if mesh is None or not mesh.is_multi_process:
        return False
    together = mesh.size // mesh.shape[DATA]
    return len(mesh.local_devices) % together != 0


def local_mesh(mesh: Mesh | None) -> Mesh | None:
    """Returns the mesh on which this process can compute with the weights.

    This is the process's own part of the mesh if it holds all shards of a weight, else the mesh.
    """
    if mesh is None or not mesh.is_multi_process or is_shared(mesh):
        return mesh
    own = [device for device in mesh.devices.flat if device in mesh.local_devices]
    inner = [mesh.shape[axis] for axis in _INNER]
    shape = (len(own) // math.prod(inner), *inner)
    return Mesh(np.array(own).reshape(shape), AXES, axis_types=mesh.axis_types)


def local_view(mesh: Mesh | None, tree: Any) -> Any:
    """Returns views of arrays on `local_mesh`, without a copy."""
    own = local_mesh(mesh)
    if own is None or own is mesh:
        return tree
    return jax.tree.map(lambda leaf: _on_mesh(own, leaf), tree)


def own_rows(mesh: Mesh | None, rows: int) -> slice:
    """Returns the rows of a batch on this process's devices; all rows if they are not adjacent."""
    if mesh is None or not mesh.is_multi_process:
        return slice(None)
    placed = layout.row_sharding(mesh, rows)
    held = set()
    for index in placed.addressable_devices_indices_map((rows,)).values():
        assert index is not None
        held.update(range(rows)[index[0]])
    first = min(held)
    last = max(held) + 1
    return slice(first, last) if len(held) == last - first < rows else slice(None)


def shard_batch(mesh: Mesh | None, batch: Any, *, rows: int | None = None) -> Any:
    """Shards the rows of a batch; each process places only its own rows on its devices.

    Args:
        mesh: the devices; None for a single device.
        batch: all rows, or this process's `own_rows`.
        rows: the number of all rows if `batch` holds `own_rows`; else None.
    """
    if mesh is None:
        return jax.device_put(batch)

    def shard(values: Any) -> Array:
        array = np.asarray(values)
        if rows is None:
            placed = layout.row_sharding(mesh, len(array))
            return jax.make_array_from_callback(
                array.shape, placed, lambda index: array[index]
            )
        return jax.make_array_from_process_local_data(
            layout.row_sharding(mesh, rows), array, (rows, *array.shape[1:])
        )

    return jax.tree.map(shard, batch)


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Sets the mesh for everything that is traced inside the block.

    The weights must be placed on it by `place` or `load_model(mesh=...)`; otherwise public
    functions raise. Your own `jax.jit` program fails with an XLA error about a custom call such as
    `GlobalToLocalShape`: while it is traced, misplaced weights look like those that `jax.set_mesh`
    will place.

    Raises:
        ValueError: a mesh with axes of the type `AxisType.Explicit`.
    """
    if mesh is None:
        return contextlib.nullcontext()
    refuse_explicit_axes(mesh, "use_mesh: `mesh`")
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def constrain_rows(tree: Any, axis: int) -> Any:
    """Constrains the rows of a tree's arrays to be sharded, if the traced program has a mesh.

    Args:
        tree: arrays with rows.
        axis: of the rows.
    """
    # Without a mesh the constraint would be an error.
    sizes = mesh_sizes()
    if not sizes:
        return tree

    def constrain(array: Array) -> Array:
        axes = layout.row_axes(array.shape[axis], sizes)
        lead = (None,) * axis
        return jax.lax.with_sharding_constraint(
            array, PartitionSpec(*lead, axes or None)
        )

    return jax.tree.map(constrain, tree)


def constrain_layout(tree: Any) -> Any:
    """Constrains a tree's arrays to the shardings of `place`, if the traced program has a mesh."""
    sizes = mesh_sizes()
    if not sizes:
        return tree
    return jax.lax.with_sharding_constraint(tree, layout.specs(sizes, tree))
