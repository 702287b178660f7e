"""The safetensors format: read by memory map, and written without a second copy. Level 2.

Eight bytes of length, a JSON header, the data. The `safetensors` package copies each tensor when
it reads, and all of them at once when it writes; at 26 GB that decides what fits.
Source: huggingface/safetensors README.md (the format).
"""

import json
import math
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .atomic import replacing

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# A 13B model's header has some 300 kB.
_HEADER_LIMIT = 16 << 20


def _header(data: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The header's entries, and where the data begin."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(_HEADER_LIMIT, len(data) - 8):
        raise ValueError("its header does not fit in it")
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        raise ValueError("its header is no JSON") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    header.pop("__metadata__", None)
    return header, 8 + size


def _entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """A tensor's dtype, shape, first byte and the byte behind its last, checked."""
    entry = entry if isinstance(entry, dict) else {}
    dtype = _DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        raise ValueError(f"{name[:80]!r} has dtype {str(entry.get('dtype'))[:20]!r}")
    shape, span = entry.get("shape"), entry.get("data_offsets")
    for numbers in (shape, span):
        if not isinstance(numbers, list) or len(numbers) > 16:
            raise ValueError(f"{name[:80]!r} has no shape or no place")
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError(f"{name[:80]!r} has no shape or no place")
    if len(span) != 2 or span[1] - span[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the shape and the place of {name[:80]!r} disagree")
    return dtype, tuple(shape), span[0], span[1]


def _tensors(data: mmap.mmap) -> dict[str, np.ndarray]:
    header, first = _header(data)
    entries = {name: _entry(name, entry) for name, entry in header.items()}
    reached, found = 0, {}
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != reached:
            raise ValueError(f"there is a hole or an overlap before {name[:80]!r}")
        reached = end
    if first + reached != len(data):
        raise ValueError(f"it should have {first + reached} bytes but has {len(data)}")
    for name, (dtype, shape, begin, _) in entries.items():
        count = math.prod(shape)
        flat = np.frombuffer(data, dtype, count, first + begin) if count else np.empty(0, dtype)
        found[name] = flat.reshape(shape)
    return found


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file, as read-only views of the mapped file.

    Raises:
        ValueError: no safetensors file; the sentence has the path.
    """
    try:
        if not path.is_file() or path.stat().st_size < 8:
            raise ValueError("it is too short")
        with path.open("rb") as file:
            return _tensors(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError as error:
        raise ValueError(f"checkpoint: `{path}` is no safetensors file: {error}.") from None


def write_safetensors(
    path: Path,
    items: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: dict[str, str] | None = None,
) -> None:
    """The arrays as a .safetensors file; whole or not at all.

    Args:
        path: where.
        items: names and arrays; views stay views until each is written.
        metadata: further entries of the header.

    Raises:
        ValueError: a dtype that the format does not have, or a folder that does not exist.
    """
    # Wide dtypes first, as the format's own package does, so that every tensor is aligned.
    arrays = sorted(items, key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    reached = 0
    for name, array in arrays:
        if array.dtype not in _NAMES:
            raise ValueError(f"write_safetensors: `{name}` has dtype {array.dtype}, unknown there.")
        span = [reached, reached := reached + array.nbytes]
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": span,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in arrays:
            file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
