"""One program on many devices: a batch's rows are spread over them, the rest is on all.

A program is written as for one device. Its compiler is told where arrays lie, and spreads the rest;
only what it cannot see into, the WKV op's kernels, is called on each device by `by_rows`.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

# The mesh axis over which rows are spread.
BATCH_AXIS = "data"


def make_data_mesh(rows: int) -> Mesh | None:
    """As many devices as can share `rows` rows alike; None for a single one.

    Raises:
        ValueError: there are several processes, and their devices cannot.
    """
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
    if jax.process_count() > 1 and count < len(devices):
        raise ValueError(
            f"a step's {rows} rows must be a multiple of the {len(devices)} devices of "
            f"{jax.process_count()} processes; change `config.data.batch_size`, "
            "`config.optimizer.accumulate` or, at test time, `config.test_time.prompts`."
        )
    if count == 1:
        return None
    return Mesh(np.array(devices[:count]), (BATCH_AXIS,), axis_types=(AxisType.Auto,))


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """The arrays of a tree, whole on each device; on this process's first one without a mesh."""
    place = jax.local_devices()[0] if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.device_put(tree, place)


def local_replica(mesh: Mesh | None, tree: Any) -> Any:
    """The arrays that are `everywhere`, on this process's first device; without a copy."""
    return tree if mesh is None else jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def shard_batch(mesh: Mesh | None, batch: Any) -> Any:
    """The whole batch, which each process has, with its rows on their devices."""
    if mesh is None:
        return jax.device_put(batch)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXIS))

    def placed(array: np.ndarray) -> Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, rows, lambda index: array[index])

    return jax.tree.map(placed, batch)


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """What is traced inside knows the mesh."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _devices() -> int:
    """Those over which the rows of what is being traced are spread."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[BATCH_AXIS] if kinds.get(BATCH_AXIS) == AxisType.Auto else 1


def constrain_sharding(tree: Any, *axes: str | None) -> Any:
    """The arrays of a tree with their leading axes over these axes of the mesh, if there is one."""
    if _devices() == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(*axes))


def shard_map_batch(function: Callable, *arrays: Any) -> Any:
    """`function(*arrays)`, each device calling it with its share of the rows: the leading axis.

    All arrays have that axis, and so has what the function gives. Rows that cannot be shared alike
    are computed on every device.
    """
    count = _devices()
    if count == 1:
        return function(*arrays)
    shared = jax.tree.leaves(arrays)[0].shape[0] % count == 0
    spec = PartitionSpec(BATCH_AXIS) if shared else PartitionSpec()
    return jax.shard_map(function, in_specs=spec, out_specs=spec)(*arrays)
