"""The devices of a program as a mesh, and arrays placed on it."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from rwkv7_jax.sharding import layout
from rwkv7_jax.sharding.collectives import mesh_sizes
from rwkv7_jax.sharding.layout import AXES, DATA, FSDP, SEQUENCE

# The choice that leaves the sizes of a mesh to `make_mesh`.
AUTO = "auto"


def make_mesh(
    choice: str | Mapping[str, int],
    rows: int,
    devices: Sequence[Any] | None = None,
) -> Mesh | None:
    """Makes the mesh of a run; None if it is one device.

    Args:
        choice: the sizes of `data`, `fsdp` and `sequence` by name, or "auto": rows over as many
            devices as divide them evenly, and all weights on each of them.
        rows: of a step.
        devices: all by default.

    Raises:
        ValueError: sizes that the devices do not have; or "auto" with several processes whose
            devices do not divide the rows evenly.
    """
    # Of devices that a program is only compiled for, any may be together.
    here = jax.local_device_count() if devices is None else 0
    devices = list(jax.devices() if devices is None else devices)
    if isinstance(choice, Mapping):
        sizes = {axis: choice.get(axis, 1) for axis in AXES}
        if math.prod(sizes.values()) > len(devices):
            raise ValueError(
                f"`config.mesh` must have at most the {len(devices)} devices that there are; "
                f"got {_described(sizes)}."
            )
    else:
        sizes = _automatic(rows, devices)
    count = math.prod(sizes.values())
    processes = _processes(devices)
    together = sizes[FSDP] * sizes[SEQUENCE]
    if processes > 1 and (count < len(devices) or here % together):
        raise ValueError(
            "`config.mesh` must have all devices of all processes, and fsdp and sequence within "
            "each of them; "
            f"got {_described(sizes)} of {processes} processes with {here} devices each."
        )
    if count == 1:
        return None
    return Mesh(
        _arranged(sizes, devices[:count]),
        AXES,
        # The compiler partitions a program that is written for one device.
        axis_types=(AxisType.Auto,) * len(AXES),
    )


def stack_mesh(mesh: Mesh | None, sets: int) -> Mesh | None:
    """Returns the devices that share the sets of a stack.

    Weights in shards, and several processes, keep the mesh: where its devices do not divide the
    sets evenly, each updates all of them. Weights that every device has leave the choice free.

    Args:
        mesh: that the weights lie on.
        sets: of parameters that are trained together.
    """
    if mesh is not None and (mesh.shape[FSDP] > 1 or mesh.is_multi_process):
        return mesh
    return make_mesh(AUTO, sets)


def sizes_of(mesh: Mesh | None) -> Mapping[str, int]:
    """Returns the sizes of a mesh's axes, by name; none for a single device."""
    return {} if mesh is None else mesh.shape


def _processes(devices: Sequence[Any]) -> int:
    return len({device.process_index for device in devices})


def _described(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def _automatic(rows: int, devices: Sequence[Any]) -> dict[str, int]:
    """Chooses sizes for a step's rows."""
    count = len(devices)
    # Fewer devices rather than padded rows, which every loss and metric would have to leave out.
    while rows % count:
        count -= 1
    processes = _processes(devices)
    if processes > 1 and count < len(devices):
        raise ValueError(
            f"a step's {rows} rows must be a multiple of the {len(devices)} devices of "
            f"{processes} processes; change `config.data.batch_size`, "
            "`config.optimizer.accumulate` or, at test time, `config.test_time.prompts`."
        )
    return {DATA: count, FSDP: 1, SEQUENCE: 1}


def _group(device: Any) -> tuple[int, int]:
    """Tells which devices are near each other and belong to one process."""
    return (getattr(device, "slice_index", 0), device.process_index)


def _arranged(sizes: Mapping[str, int], devices: list[Any]) -> np.ndarray:
    """Puts devices in an order in which neighbours of the mesh are neighbours on the board."""
    groups = len({_group(device) for device in devices})
    if groups > 1 and sizes[DATA] % groups == 0:
        inner = (sizes[DATA] // groups, sizes[FSDP], sizes[SEQUENCE])
        return mesh_utils.create_hybrid_device_mesh(
            inner, (groups, 1, 1), devices, process_is_granule=True
        )
    shape = tuple(sizes[axis] for axis in AXES)
    return mesh_utils.create_device_mesh(shape, devices)


def place(mesh: Mesh | None, tree: Any) -> Any:
    """Puts the arrays of a tree where the layout says; without a mesh, on the first local device.

    An array that lies there already is not copied. With several processes, each has all arrays and
    puts its own shards. Shapes are described with their shardings: a step can be compiled for
    devices that are not there.
    """
    leaves = jax.tree.leaves(tree)
    # Without an array nothing tells that the devices of a mesh are there.
    if not leaves or any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return layout.abstract_shards(mesh, tree)
    if mesh is None:
        return jax.device_put(tree, jax.local_devices()[0])
    own = local_mesh(mesh)
    placed = jax.device_put(tree, layout.shardings(own or mesh, tree))
    if own is mesh:
        return placed
    return jax.tree.map(lambda leaf: _on_mesh(mesh, leaf), placed)


def _on_mesh(mesh: Mesh, leaf: Array) -> Array:
    """Takes an array's shards on the devices of this process for those of an array on a mesh."""
    return jax.make_array_from_single_device_arrays(
        leaf.shape,
        NamedSharding(mesh, cast(NamedSharding, leaf.sharding).spec),
        [shard.data for shard in leaf.addressable_shards],
    )


def bytes_on_a_device(tree: Any) -> int:
    """Counts the bytes of a tree's arrays that one device of this process holds."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total += leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    return total


def parse_sizes(text: str, argument: str) -> str | dict[str, int]:
    """Reads the sizes of a mesh, such as "data=2,fsdp=4", or "auto".

    Args:
        text: of a setting or a command line.
        argument: its name in backticks, for messages.

    Raises:
        ValueError: an axis that there is not, or a size that is no positive integer.
    """
    if text == AUTO:
        return AUTO
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        is_count = size.isdecimal() and int(size) > 0
        if axis not in AXES or axis in sizes or not is_count:
            raise ValueError(
                f"{argument} must be {AUTO}, or sizes of {', '.join(AXES)} such as fsdp=8; "
                f"got {text!r}."
            )
        sizes[axis] = int(size)
    return sizes


def local_mesh(mesh: Mesh | None) -> Mesh | None:
    """Returns the part of a mesh that belongs to this process: all of it if there is one process.

    The shards of a weight lie on the devices of one process, so the part has all of them.
    """
    if mesh is None or not mesh.is_multi_process:
        return mesh
    own = [device for device in mesh.devices.flat if device in mesh.local_devices]
    inner = (mesh.shape[FSDP], mesh.shape[SEQUENCE])
    shape = (len(own) // math.prod(inner), *inner)
    return Mesh(np.array(own).reshape(shape), AXES, axis_types=mesh.axis_types)


def local_view(mesh: Mesh | None, tree: Any) -> Any:
    """Returns arrays as they lie on this process's own devices, on `local_mesh`; without a copy."""
    own = local_mesh(mesh)
    if own is None or own is mesh:
        return tree
    return jax.tree.map(lambda leaf: _on_mesh(own, leaf), tree)


def shard_batch(mesh: Mesh | None, batch: Any) -> Any:
    """Shards the rows of a batch, all of which every process has."""
    if mesh is None:
        return jax.device_put(batch)

    def shard(values: Any) -> Array:
        # Each process puts only its own rows on its devices.
        array = np.asarray(values)
        axes = layout.row_axes(array.shape[0], mesh.shape)
        rows = NamedSharding(mesh, PartitionSpec(axes or None))
        return jax.make_array_from_callback(
            array.shape, rows, lambda index: array[index]
        )

    return jax.tree.map(shard, batch)


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Makes the mesh known to everything that is traced inside the block."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def constrain_rows(tree: Any, axis: int) -> Any:
    """Shards the rows of a tree's arrays, if the program that is traced has a mesh.

    Args:
        tree: arrays with rows.
        axis: of the rows.
    """
    # Asked while tracing: without a mesh the constraint would be an error.
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
    """Places a tree's arrays as `place` does, if the program that is traced has a mesh."""
    sizes = mesh_sizes()
    if not sizes:
        return tree
    return jax.lax.with_sharding_constraint(tree, layout.specs(sizes, tree))
