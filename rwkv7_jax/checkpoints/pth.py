"""PyTorch's zip checkpoints: read by memory map, running nothing, and written.

A `.pth` file is a zip with one pickle and one entry per storage.
Source: pytorch/pytorch torch/serialization.py (the layout).
"""

import io
import itertools
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.checkpoints.restricted_unpickler import STORAGE_NAMES, RestrictedUnpickler

# A 13B model's pickle has some 200 kB; what is larger is no checkpoint.
_PICKLE_LIMIT = 16 << 20

_DIRECTORY_LIMIT = 2 << 20

_ALIGNMENT = 64

_SHOWN = 160


class _ShortReads(io.FileIO):
    """A file for `zipfile`, which reads the whole list of entries at once, however long it is."""

    def read(self, size: int = -1) -> bytes:
        """At most the limit, or an error; the few open-ended reads begin near the file's end."""
        if size > _DIRECTORY_LIMIT:
            raise ValueError("its list of entries is longer than any checkpoint's")
        return super().read(size)


def _entries(path: Path, data: mmap.mmap) -> dict[str, memoryview]:
    """The zip's entries as views of the mapped file, by the name behind the archive's folder."""
    views, spans, whole, folders = {}, [], memoryview(data), set()
    with _ShortReads(path) as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            parts = info.filename.split("/")
            if ".." in parts or not parts[0] or "\\" in info.filename or len(parts) < 2:
                raise ValueError(f"its entry {info.filename!r} is no place inside the archive")
            folders.add(parts[0])
            if "/".join(parts[1:]) in views or len(folders) > 1:
                raise ValueError(f"its entry {info.filename!r} is there twice or apart")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise ValueError(f"its entry {info.filename!r} is compressed or encrypted")
            head = data[info.header_offset : info.header_offset + 30]
            if len(head) < 30 or head[:4] != b"PK\x03\x04":
                raise ValueError(f"its entry {info.filename!r} has no header")
            first = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
            if first + info.file_size > len(data) or info.file_size != info.compress_size:
                raise ValueError(f"its entry {info.filename!r} reaches out of the file")
            views["/".join(parts[1:])] = whole[first : first + info.file_size]
            spans.append((info.header_offset, first + info.file_size))
    spans.sort()
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
        raise ValueError("its entries overlap")
    return views


def read_pth(path: str | Path) -> Any:
    """What the file holds, a flat or nested dict; tensors are read-only views of the mapped file.

    bfloat16 comes as `ml_dtypes.bfloat16`; parameters as plain arrays, ordered dicts as dicts.

    Args:
        path: a file that `torch.save` wrote in its zip format (PyTorch 1.6 and newer).

    Raises:
        ValueError: anything else; a forbidden name in the pickle is in the sentence.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"read_pth: `{path}` is no file.")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip file; files of PyTorch before 1.6 must be saved anew")
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        entries = _entries(path, data)
        program = bytes(entries.get("data.pkl", b"")[: _PICKLE_LIMIT + 1])
        if not program or len(program) > _PICKLE_LIMIT:
            raise ValueError("it has no data.pkl of a sensible size")
        if bytes(entries.get("byteorder", b"little")) != b"little":
            raise ValueError("it is not in little-endian order")
        storages = {n.removeprefix("data/"): v for n, v in entries.items() if n.startswith("data/")}
        return RestrictedUnpickler(storages).run(program)
    except (ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"read_pth: `{path}` is refused: {_shown(error)}.") from None
    except (LookupError, TypeError, AttributeError, OverflowError, struct.error):
        raise ValueError(f"read_pth: `{path}` is refused: its pickle is broken.") from None


def _shown(error: Exception) -> str:
    """The reason on one line of sensible length: names in a hostile file may hold anything."""
    text = "".join(c if c.isprintable() else "?" for c in str(error)[:_SHOWN])
    return text.rstrip(".")


def _pickled(value: str | int | bool) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def _pickled_tuple(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_pickled, values)) + b"t"


def _pickled_tensor(key: str, array: np.ndarray) -> bytes:
    """The call that rebuilds a contiguous tensor from its storage."""
    storage = STORAGE_NAMES[array.dtype].encode()
    strides = [math.prod(array.shape[i + 1 :]) for i in range(array.ndim)]
    where = [_pickled("storage"), b"ctorch\n" + storage + b"\n", *map(_pickled, (key, "cpu"))]
    return b"".join(
        [
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            *where,
            _pickled(array.size) + b"tQ" + _pickled(0),
            _pickled_tuple(array.shape) + _pickled_tuple(strides),
            _pickled(False) + b"ccollections\nOrderedDict\n)RtR",
        ]
    )


def _put(archive: zipfile.ZipFile, name: str, data) -> None:
    """One stored entry whose data begin at a multiple of the alignment, for memory maps."""
    info = zipfile.ZipInfo(f"archive/{name}")
    # The margin is the one by which `zipfile` decides that an entry is a long one.
    long = 20 if len(data) * 1.05 > zipfile.ZIP64_LIMIT else 0
    begin = archive.fp.tell() + 30 + len(info.filename) + 4 + long
    padding = -begin % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    archive.writestr(info, data)


def write_pth(path: str | Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """A file that `torch.load(weights_only=True)` reads, also with `mmap`; whole or not at all.

    Arrays are taken from `tensors` one at a time, so that a lazy iterable needs memory for one.

    Raises:
        ValueError: a dtype that has no PyTorch storage, or a folder that does not exist.
    """
    with atomic_write(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        program = [b"\x80\x02}("]
        for number, (name, array) in enumerate(tensors):
            if array.dtype not in STORAGE_NAMES:
                raise ValueError(f"write_pth: `{name}` has dtype {array.dtype}, unknown there.")
            shape, array = array.shape, np.ascontiguousarray(array)
            _put(archive, f"data/{number}", memoryview(array.reshape(-1).view(np.uint8)))
            program.append(_pickled(name) + _pickled_tensor(str(number), array.reshape(shape)))
        _put(archive, "data.pkl", b"".join([*program, b"u."]))
        _put(archive, "byteorder", b"little")
        _put(archive, "version", b"3\n")
