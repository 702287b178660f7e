"""Construction of a checkpoint's parameter tree, leaf by leaf, replicated or sharded.

A leaf of stacked layers is built in one host buffer, which is freed once the leaf is on its
devices. A sharded leaf is built shard by shard: the host holds one shard at a time, and each
process reads only the shards of its own devices.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints import tensor_names
from rwkv7_jax.checkpoints.mapped_files import release_pages
from rwkv7_jax.checkpoints.param_tree import (
    TreePath,
    require_finite,
    require_kept,
    require_no_overflow,
    tree_path,
)
from rwkv7_jax.checkpoints.tensor_names import Index, Shape, Tensor, Tensors
from rwkv7_jax.model.casts import promoted
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.sharding.layout import axes_of, spec

# Called with the number of bytes done and the total.
Progress = Callable[[int, int], None] | None

# Maps the path and the array of a leaf, or of a shard of it, to the value in the tree.
Convert = Callable[[TreePath, np.ndarray], Any]

# The alignment with which XLA uses a NumPy buffer on CPU without a copy.
_JAX_ALIGNMENT = 64


def _aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Allocates an array that JAX can alias on CPU instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _JAX_ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _JAX_ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _common_dtype(tensors: Tensors, names: list[str], dtype, path: str) -> np.dtype:
    """Returns the dtype of a stack of tensors; mixed dtypes are promoted without loss."""
    if dtype is None:
        dtypes = [tensors[name].dtype for name in names]
        dtype = promoted(*dtypes)
        require_kept(dtype, names[0], path)
    return np.dtype(dtype)


def _read_stack(
    tensors: Tensors,
    names: list[str],
    shape: Shape,
    index: Index,
    *,
    dtype: Any,
    path: str,
    allow_nan: bool,
) -> np.ndarray:
    """Reads the same part of several tensors into one array with a leading axis.

    Args:
        tensors: tensors of the file.
        names: names of the tensors to stack.
        shape: shape of each tensor.
        index: index of the part.
        dtype: dtype of the array; None keeps the file's.
        path: path of the file, for error messages.
        allow_nan: accept NaN and Inf.
    """
    dtype = _common_dtype(tensors, names, dtype, path)
    part = tuple(len(range(size)[one]) for one, size in zip(index, shape, strict=True))
    stacked = _aligned_empty((len(names), *part), dtype)
    for row, name in zip(stacked, names, strict=True):
        if len(shape) > 1:
            array = tensors[name].part(index)
        else:
            # Removes the axes of size 1 that official vectors have.
            array = tensors[name].read().reshape(shape)[index]
        if not allow_nan:
            require_finite(array, name, path)
        # NumPy would warn of an overflow; the check below also names the tensor.
        with np.errstate(over="ignore", invalid="ignore"):
            row[...] = array
        require_no_overflow(array, row, name, path)
        release_pages(array)
    return stacked


def put_in_shards(
    sharding: NamedSharding, shape: Shape, read: Callable[[Index], Any]
) -> Any:
    """Builds sharded arrays; each shard is read once, however many devices hold it.

    Args:
        sharding: sharding of the leading axes of all arrays.
        shape: shape of the full array.
        read: maps the index of a shard to the shard, an array or a tree of arrays.
    """
    # `jax.make_array_from_callback` would read a shard once per device.
    devices_of: dict[tuple, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(
            (range(size)[part].start, range(size)[part].stop)
            for part, size in zip(index, shape, strict=True)
        )
        devices_of.setdefault(bounds, []).append(device)
    shards: list[list[jax.Array]] = []
    tree: Any = None
    for bounds, devices in devices_of.items():
        leaves, tree = jax.tree.flatten(read(tuple(slice(*ends) for ends in bounds)))
        for device in devices:
            # Two CPU devices must not share one buffer.
            shards.append(
                [jax.device_put(leaf, device, may_alias=False) for leaf in leaves]
            )
    arrays = []
    for parts in zip(*shards, strict=True):
        own = PartitionSpec(*sharding.spec[: parts[0].ndim])
        placed = NamedSharding(sharding.mesh, own)
        whole = _whole_shape(parts[0].shape, placed)
        arrays.append(
            jax.make_array_from_single_device_arrays(whole, placed, list(parts))
        )
    return jax.tree.unflatten(tree, arrays)


def _whole_shape(part: Shape, sharding: NamedSharding) -> Shape:
    shape = []
    for size, entry in zip(part, sharding.spec, strict=True):
        parts = math.prod(sharding.mesh.shape[axis] for axis in axes_of(entry))
        shape.append(size * parts)
    return tuple(shape)


def _names_by_path(tensors: Tensors, config: RWKV7Config) -> dict[TreePath, list[str]]:
    """Groups the names of the file's tensors by the leaf that they become."""
    groups: dict[TreePath, list[str]] = {}
    for name in tensor_names.accepted_shapes(config):
        if name in tensors:
            groups.setdefault(tree_path(name), []).append(name)
    return groups


def loaded_tensors(
    tensors: Tensors, config: RWKV7Config, path: str, *, dtype=None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the same as `official_tensors` of the built tree, sorted by name, without building it.

    Args:
        tensors: as in `build_tree`.
        config: the config of the model.
        path: path of the file, for error messages.
        dtype: dtype of all leaves; None keeps the file's.
    """
    shapes = tensor_names.accepted_shapes(config)
    dtypes: dict[str, np.dtype] = {}
    for names in _names_by_path(tensors, config).values():
        dtypes |= dict.fromkeys(names, _common_dtype(tensors, names, dtype, path))
    for name in sorted(dtypes):
        array = tensors[name].read()
        yield name, array.reshape(shapes[name]).astype(dtypes[name], copy=False)
        release_pages(array)


def build_tree(
    tensors: Tensors,
    config: RWKV7Config,
    path: str,
    *,
    dtype=None,
    allow_nan: bool = False,
    progress: Progress = None,
    convert: Convert | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """Reads checked tensors into a parameter tree of arrays on devices.

    Args:
        tensors: tensors with official names and orientation.
        config: the config of the model.
        path: path of the file, for error messages.
        dtype: dtype of all leaves; None keeps the file's.
        allow_nan: accept NaN and Inf.
        progress: called with the number of bytes done and the total.
        convert: maps a leaf's path and array to the value in the tree; None keeps the array.
        mesh: mesh to shard the leaves over; None uses the default device.

    Raises:
        ValueError: a tensor has NaN or Inf, or is float64 and x64 is off; the message names it.
    """
    shapes = tensor_names.accepted_shapes(config)
    # One leaf at a time: peak memory is the model plus one stack of layers.
    total = sum(map(_num_bytes, tensors.values()))
    done = 0
    leaves: dict[TreePath, Any] = {}
    for place, names in _names_by_path(tensors, config).items():
        read_part = functools.partial(
            _read_stack,
            tensors,
            names,
            shapes[names[0]],
            dtype=dtype,
            path=path,
            allow_nan=allow_nan,
        )
        leaves[place] = _leaf(place, names, shapes, read_part, convert, mesh)
        for name in names:
            done += _num_bytes(tensors[name])
        if progress:
            progress(done, total)
    return traverse_util.unflatten_dict(leaves)


def _leaf(
    path: TreePath,
    names: list[str],
    shapes: dict[str, Shape],
    read_part: Callable[[Index], np.ndarray],
    convert: Convert | None,
    mesh: Mesh | None,
) -> Any:
    """Builds one leaf of the tree, on the default device or sharded over a mesh."""
    is_stack = path[0] == "layers"
    shape = (*([len(names)] if is_stack else []), *shapes[names[0]])

    def read_leaf(index: Index) -> np.ndarray:
        # Every shard has all layers of a stack.
        return read_part(index[1:]) if is_stack else read_part(index)[0]

    def read(index: Index) -> Any:
        if convert is None:
            return read_leaf(index)
        # An int8 row has one scale for all its columns, so whole rows are read.
        *rows, columns = index
        return jax.tree.map(
            lambda one: one[..., columns] if one.ndim == len(shape) else one,
            convert(path, read_leaf((*rows, slice(None)))),
        )

    if mesh is None:
        # Nothing else refers to the buffers, so JAX may alias them.
        return jax.device_put(read((slice(None),) * len(shape)), may_alias=True)
    sharding = NamedSharding(mesh, spec("/".join(path), shape, mesh.shape))
    return put_in_shards(sharding, shape, read)


def _num_bytes(tensor: Tensor) -> int:
    """Returns the size of a tensor in its file."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize
