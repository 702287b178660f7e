"""Files of rwkv.cpp: a sequence of tensors, each with its shape, name and data.

The names are official except `att.x_rwkvag`, which holds all six lerps. The low-rank matrices are
transposed.
Source: RWKV/rwkv.cpp@4358e70 docs/FILE_FORMAT.md.
"""

import math
import mmap
import struct
from pathlib import Path

import numpy as np

from rwkv7_jax.checkpoints.mapped_files import map_file
from rwkv7_jax.checkpoints.tensor_names import Shape, Tensor

# Magic number, version, vocabulary size, width, number of layers, type of most tensors.
_HEADER = struct.Struct("<6i")

# Number of axes, length of the name, type of the tensor.
_ENTRY = struct.Struct("<3i")

# Version 101 differs from 100 only in quantised types.
_VERSIONS = (100, 101)

_DTYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float16)}

_QUANTIZED = {2: "Q4_0", 3: "Q4_1", 7: "Q5_0", 8: "Q5_1", 9: "Q8_0"}

# More than any checkpoint has: with a damaged count, the rest of the file could be read as a name.
_MOST_AXES = 4
_LONGEST_NAME = 256


def read_rwkv_cpp(path: Path) -> dict[str, Tensor]:
    """Opens a memory-mapped file of rwkv.cpp; tensor data is read on demand.

    Raises:
        ValueError: the file is quantised or damaged; the message has the path.
    """
    data = map_file(path)
    _check_header(data, path)
    tensors: dict[str, Tensor] = {}
    position = _HEADER.size
    while position < len(data):
        name, shape, dtype, start = _read_entry(data, position, path)
        position = start + math.prod(shape) * dtype.itemsize
        if position > len(data):
            raise _cut(path, f"inside {name!r}")
        if name in tensors:
            raise _damaged(path, f"it has {name!r} twice")
        tensors[name] = Tensor.mapped(data, shape, dtype, start)
    return tensors


def _check_header(data: mmap.mmap, path: Path) -> None:
    """Raises unless the header is that of a file that is not quantised."""
    if len(data) < _HEADER.size:
        raise _cut(path, "inside its header")
    _, version, *_, kind = _HEADER.unpack_from(data)
    if version not in _VERSIONS:
        raise ValueError(
            f"`{path}` is a file of rwkv.cpp of version {version}; "
            f"versions {_VERSIONS[0]} and {_VERSIONS[1]} are read."
        )
    _dtype_of(kind, path)


def _dtype_of(kind: int, path: Path) -> np.dtype:
    """Returns the dtype for a type code; raises for quantised types."""
    if kind in _DTYPES:
        return _DTYPES[kind]
    if kind in _QUANTIZED:
        raise ValueError(
            f"`{path}` is a file of rwkv.cpp quantised to {_QUANTIZED[kind]}; use the "
            "FP32 or FP16 file that it was made from."
        )
    raise _damaged(path, f"it has tensors of the unknown type {kind}")


def _read_entry(
    data: mmap.mmap, position: int, path: Path
) -> tuple[str, Shape, np.dtype, int]:
    """Reads a tensor's name, shape and dtype, and the offset of its data."""
    if position + _ENTRY.size > len(data):
        raise _cut(path, "between two tensors")
    axes, length, kind = _ENTRY.unpack_from(data, position)
    if not 0 < axes <= _MOST_AXES or not 0 < length <= _LONGEST_NAME:
        raise _damaged(path, f"it has no tensor at byte {position:,}")
    dtype = _dtype_of(kind, path)
    position += _ENTRY.size
    start = position + 4 * axes + length
    if start > len(data):
        raise _cut(path, "inside a tensor's name")
    # The last axis comes first.
    shape = struct.unpack_from(f"<{axes}i", data, position)[::-1]
    name = data[position + 4 * axes : start].decode("utf-8", "replace")
    if min(shape) < 1 or not name.isprintable():
        raise _damaged(path, f"it has no tensor at byte {position:,}")
    return name, shape, dtype, start


def _cut(path: Path, place: str) -> ValueError:
    """Builds the error for a truncated file."""
    size = path.stat().st_size
    return ValueError(
        f"`{path}` is an incomplete download: the file ends {place} ({size:,} bytes); "
        "download it again."
    )


def _damaged(path: Path, reason: str) -> ValueError:
    """Builds the error for a file that rwkv.cpp cannot have written."""
    return ValueError(f"`{path}` is a damaged file of rwkv.cpp: {reason}.")
