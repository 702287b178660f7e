"""One program on many devices: the rows of a batch are sharded, everything else is replicated.

A program is written as for one device. The compiler is told where the arrays lie and partitions the
program itself. It cannot look into the kernels of the WKV op: those are called on each device by
`shard_map_batch`.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

# The mesh axis along which rows are sharded.
BATCH_AXIS = "data"


def make_data_mesh(rows: int) -> Mesh | None:
    """Makes a mesh of as many devices as divide `rows` evenly; None if that is one device.

    Raises:
        ValueError: there are several processes, and their devices do not divide the rows evenly.
    """
    devices = jax.devices()
    count = len(devices)
    # Fewer devices rather than padded rows, which every loss and metric would have to leave out.
    while rows % count:
        count -= 1
    if jax.process_count() > 1 and count < len(devices):
        raise ValueError(
            f"a step's {rows} rows must be a multiple of the {len(devices)} devices of "
            f"{jax.process_count()} processes; change `config.data.batch_size`, "
            "`config.optimizer.accumulate` or, at test time, `config.test_time.prompts`."
        )
    if count == 1:
        return None
    # Auto: the compiler partitions a program that is written for one device.
    return Mesh(np.array(devices[:count]), (BATCH_AXIS,), axis_types=(AxisType.Auto,))


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """Copies the arrays of a tree to every device; without a mesh, to the first local device."""
    if mesh is None:
        return jax.device_put(tree, jax.local_devices()[0])
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def local_replica(mesh: Mesh | None, tree: Any) -> Any:
    """Returns replicated arrays as they lie on this process's first device; without a copy."""
    if mesh is None:
        return tree
    # Every device has all of a replicated array, so its first local shard is the array.
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def shard_batch(mesh: Mesh | None, batch: Any) -> Any:
    """Shards the rows of a batch, all of which every process has."""
    if mesh is None:
        return jax.device_put(batch)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXIS))

    def shard(values: Any) -> Array:
        # Each process puts only its own rows on its devices.
        array = np.asarray(values)
        return jax.make_array_from_callback(
            array.shape, rows, lambda index: array[index]
        )

    return jax.tree.map(shard, batch)


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Makes the mesh known to everything that is traced inside the block."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _batch_shards() -> int:
    """Returns over how many devices the program that is being traced shards its rows."""
    mesh = jax.sharding.get_abstract_mesh()
    axis_types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # Inside `shard_map` the axis is Manual: there the program sees only its own rows already.
    if axis_types.get(BATCH_AXIS) != AxisType.Auto:
        return 1
    return mesh.shape[BATCH_AXIS]


def constrain_sharding(tree: Any, *axes: str | None) -> Any:
    """Shards the leading axes of a tree's arrays along these mesh axes, if there is a mesh."""
    # Asked while tracing: without a mesh the constraint would be an error.
    if _batch_shards() == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(*axes))


def shard_map_batch(function: Callable, *arrays: Any, **named_arrays: Any) -> Any:
    """Calls a function on each device with the device's share of the rows.

    The leading axis of all arguments and results is the rows. Every device computes all rows where
    the devices do not divide them evenly.
    """
    shards = _batch_shards()
    if shards == 1:
        return function(*arrays, **named_arrays)
    # All arguments have the same rows, so the first leaf stands for them.
    rows = jax.tree.leaves(arrays)[0].shape[0]
    spec = PartitionSpec(BATCH_AXIS) if rows % shards == 0 else PartitionSpec()

    # `jax.shard_map` has no keyword arguments.
    def call(arrays, named_arrays):
        return function(*arrays, **named_arrays)

    return jax.shard_map(call, in_specs=spec, out_specs=spec)(arrays, named_arrays)
