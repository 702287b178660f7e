"""PyTorch's zip checkpoints: read by memory map without running anything, and written.

A `.pth` file is a zip with one pickle and one entry for each storage.
Source: pytorch/pytorch torch/serialization.py (the layout).
"""

import bisect
import io
import itertools
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.checkpoints.integrity import file_signatures
from rwkv7_jax.checkpoints.integrity.digests import ContentDigest, digest_of_arrays
from rwkv7_jax.checkpoints.mapped_files import map_file, release_pages
from rwkv7_jax.checkpoints.pickle_names import STORAGE_NAMES
from rwkv7_jax.checkpoints.restricted_unpickler import RestrictedUnpickler
from rwkv7_jax.checks import prefix_errors

# A 13B model's pickle has some 200 kB; a much larger one is not a checkpoint.
_PICKLE_LIMIT = 16 << 20

# Bytes of the zip's list of entries.
_DIRECTORY_LIMIT = 2 << 20

# Of the data in the file, so that memory maps of it are aligned for every dtype.
_ALIGNMENT = 64

# Characters of a reason that reach the terminal.
_MESSAGE_LIMIT = 160

# The entries with numbers, one for each storage.
_DATA = "data/"

# Bytes of an entry's own header, in front of its name.
_LOCAL_HEADER = 30

# An entry of ours, which other readers pass over.
_DIGEST_ENTRY = "rwkv7_jax.digest"


class _LimitedReads(io.FileIO):
    """File for `zipfile`, which reads the list of entries at once, however long it is."""

    def read(self, size: int | None = -1) -> bytes:
        """Reads at most the limit; the few reads without a size begin near the file's end."""
        if size is not None and size > _DIRECTORY_LIMIT:
            raise ValueError("its list of entries is longer than any checkpoint's")
        return super().read(size)


class StorageSums:
    """The CRC-32 sums of a file's storages; each is compared once, with a tensor that lies in it.

    Reading a tensor brings its bytes from the disk, and the sum costs little more. A file is not
    read for its sums alone.
    """

    def __init__(self, path: Path, entries: Mapping[str, tuple[memoryview, int]]):
        """Starts with no sum compared.

        Args:
            path: of the file.
            entries: of the file, with their sums.
        """
        self._path = path
        self._entries = entries
        # Storages by the addresses that they are mapped to: a tensor does not say which is its own.
        self._names: dict[int, str] = {}
        for name, (view, _) in entries.items():
            if name.startswith(_DATA) and len(view):
                self._names[np.frombuffer(view, np.uint8).ctypes.data] = name
        self._starts = sorted(self._names)
        self._compared: set[str] = set()

    def check(self, name: str, array: np.ndarray) -> None:
        """Raises unless the storage of a tensor has the sum that the file gives.

        Args:
            name: of the tensor, for the message.
            array: a view of the file.

        Raises:
            ValueError: it has another one; the message names the file and the tensor.
        """
        try:
            self._compare_tensor(name, array)
        except ValueError as error:
            raise _refusal(self._path, error) from None

    def check_all(self, content: Any) -> None:
        """Raises unless every storage of the file has its sum.

        Args:
            content: of the file.

        Raises:
            ValueError: one has another sum; the message is the reason alone.
        """
        for name, array in _named_tensors(content):
            self._compare_tensor(name, array)
        # Storages whose tensors have no name, as those in a list.
        for entry in self._names.values():
            self._compare(entry, f"entry {entry!r}")

    def _compare_tensor(self, name: str, array: np.ndarray) -> None:
        if array.size:
            index = bisect.bisect_right(self._starts, array.ctypes.data) - 1
            self._compare(self._names[self._starts[index]], f"tensor {name!r}")

    def _compare(self, entry: str, subject: str) -> None:
        if entry not in self._compared:
            _check_crc(self._entries, entry, subject)
            self._compared.add(entry)


def inner_dicts(content: dict[Any, Any]) -> list[dict[Any, Any]]:
    """Lists the dicts in a dict, each once: a small file may have thousands of names for one."""
    found = {}
    for value in content.values():
        if isinstance(value, dict):
            found[id(value)] = value
    return list(found.values())


def _named_tensors(content: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a dict, and of dicts in it, with their names."""
    # No deeper: trainers wrap a model once, and a hostile file may nest without end.
    tables = [content, *inner_dicts(content)] if isinstance(content, dict) else []
    for table in tables:
        for name, value in table.items():
            if isinstance(value, np.ndarray):
                yield str(name), value


def _entries(path: Path, data: mmap.mmap) -> dict[str, tuple[memoryview, int]]:
    """Maps each entry's name, without the archive's folder, to a view and its CRC-32."""
    content = memoryview(data)
    entries: dict[str, tuple[memoryview, int]] = {}
    spans = []
    folders = set()
    with _LimitedReads(path) as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            folder, name = _split_name(info.filename)
            folders.add(folder)
            if name in entries or len(folders) > 1:
                raise ValueError(
                    f"its entry {info.filename!r} is there twice or in another folder"
                )
            start, end = _data_span(info, data)
            entries[name] = (content[start:end], info.CRC)
            spans.append((info.header_offset, end))
    # Overlapping entries are how a small file unfolds into a large one.
    spans.sort()
    for (_, end), (next_start, _) in itertools.pairwise(spans):
        if end > next_start:
            raise ValueError("its entries overlap")
    return entries


def _split_name(filename: str) -> tuple[str, str]:
    """Splits an entry's name into the archive's folder and the rest."""
    folder, *rest = filename.split("/")
    if not folder or not rest or "\\" in filename or ".." in (folder, *rest):
        raise ValueError(f"its entry {filename!r} is not a path inside the archive")
    return folder, "/".join(rest)


def _data_span(info: zipfile.ZipInfo, data: mmap.mmap) -> tuple[int, int]:
    """Finds where an entry's data begin and end in the file."""
    # PyTorch stores without compression, and compressed data could not be mapped.
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"its entry {info.filename!r} is compressed or encrypted")
    header = data[info.header_offset : info.header_offset + _LOCAL_HEADER]
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise ValueError(
            f"its entry {info.filename!r} is damaged: its header is missing"
        )
    # The lengths in the list of entries may differ from those in the entry's own header.
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + _LOCAL_HEADER + name_length + extra_length
    end = start + info.file_size
    if end > len(data) or info.file_size != info.compress_size:
        raise ValueError(
            f"its entry {info.filename!r} extends past the end of the file"
        )
    return start, end


@prefix_errors("read_pth")
def read_pth(path: str | Path, *, verify: bool = False) -> Any:
    """Reads a PyTorch checkpoint: flat or nested dicts with read-only views of the mapped file.

    bfloat16 comes as `ml_dtypes.bfloat16`, parameters as plain arrays, ordered dicts and counters
    as dicts. Of dtypes, devices, bytes and tensors of further dtypes there are names alone.

    Args:
        path: a file that `torch.save` wrote in its zip format (PyTorch 1.6 and newer).
        verify: compare every entry with its CRC-32 and the arrays with the file's digest, which
            reads the complete file.

    Raises:
        ValueError: any other file, or a damaged one; a forbidden name in the pickle is in the
            message.
    """
    return open_pth(Path(path), verify=verify)[0]


def open_pth(path: Path, *, verify: bool = False) -> tuple[Any, StorageSums]:
    """Reads a checkpoint as `read_pth` does, and its sums, to be compared tensor by tensor.

    Args:
        path: of the file.
        verify: compare all of it at once, as `read_pth` does.

    Raises:
        ValueError: see `read_pth`.
    """
    if not path.is_file():
        raise ValueError(f"`{path}` is not a file.")
    _refuse_other_files(path)
    try:
        return _read(path, verify)
    except (ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise _refusal(path, error) from None
    # What the unpickler's stack and memo raise when a program does not fit them.
    except (
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        struct.error,
    ):
        raise ValueError(f"`{path}` is refused: its pickle is broken.") from None


def _refusal(path: Path, reason: Exception) -> ValueError:
    """Makes the error for a file that is refused."""
    return ValueError(f"`{path}` is refused: {_printable(reason)}.")


def _refuse_other_files(path: Path) -> None:
    """Raises unless the bytes are those of a complete zip archive."""
    sentence = file_signatures.describe_other_file(path)
    head = file_signatures.read_head(path)
    if sentence is None and file_signatures.is_safetensors(head, path.stat().st_size):
        sentence = (
            "holds safetensors: rename it to .safetensors (web-rwkv's files to .st)"
        )
    # Whether the list of entries is at its end.
    elif sentence is None and not zipfile.is_zipfile(path):
        if file_signatures.is_zip(head):
            sentence = file_signatures.describe_cut_zip(path)
        else:
            sentence = "is not a zip file, as PyTorch's files are; it may be damaged"
    if sentence is not None:
        raise ValueError(f"`{path}` {sentence}.")


def _read(path: Path, verify: bool) -> tuple[Any, StorageSums]:
    """Reads a checkpoint; the messages of its errors are reasons alone."""
    # Not read: a copy of a 13B model would cost 26 GB.
    data = map_file(path)
    entries = _entries(path, data)
    program = bytes(_content(entries, "data.pkl")[: _PICKLE_LIMIT + 1])
    if not program or len(program) > _PICKLE_LIMIT:
        raise ValueError("it has no data.pkl of a sensible size")
    if "byteorder" in entries and bytes(_content(entries, "byteorder")) != b"little":
        raise ValueError("it is not in little-endian order")
    # The small entries are always compared: a damaged pickle would give other names and shapes.
    storages = {}
    for name, (view, _) in entries.items():
        if name.startswith(_DATA):
            storages[name.removeprefix(_DATA)] = view
        else:
            _check_crc(entries, name, f"entry {name!r}")
    content = RestrictedUnpickler(storages).run(program)
    sums = StorageSums(path, entries)
    if verify:
        sums.check_all(content)
        if _DIGEST_ENTRY in entries:
            _check_digest(content, bytes(_content(entries, _DIGEST_ENTRY)))
        release_pages(data)
    return content, sums


def _content(entries: dict[str, tuple[memoryview, int]], name: str) -> memoryview:
    """Returns the bytes of an entry; none where the entry is missing."""
    return entries[name][0] if name in entries else memoryview(b"")


def _check_crc(
    entries: Mapping[str, tuple[memoryview, int]], name: str, subject: str
) -> None:
    """Raises unless an entry has the CRC-32 that the list of entries gives.

    Args:
        entries: of the file.
        name: of the entry.
        subject: what the entry is to a reader, for the message.
    """
    view, expected = entries[name]
    # PyTorch can be told to leave the sums out, and writes 0 then.
    if expected and zlib.crc32(view) != expected:
        raise ValueError(
            f"its {subject} is damaged (its CRC-32 differs); download or copy it again"
        )


def _check_digest(content: Any, expected: bytes) -> None:
    """Raises unless the arrays of a file that `write_pth` wrote have the digest in it."""
    if digest_of_arrays(content.items()).encode() != expected:
        raise ValueError(
            "its tensors are not those that were written (their digest differs)"
        )


def has_digest(path: Path) -> bool:
    """Returns whether a readable .pth file holds a digest of its tensors."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(f"/{_DIGEST_ENTRY}") for name in archive.namelist())


def _printable(error: Exception) -> str:
    """Shortens a reason to one printable line: names in a hostile file may hold anything."""
    text = ""
    for character in str(error)[:_MESSAGE_LIMIT]:
        text += character if character.isprintable() else "?"
    return text.rstrip(".")


def _pickled(value: str | int | bool) -> bytes:
    """Pickles one value without the protocol's opcode in front and the stop opcode at the end."""
    return pickle.dumps(value, 2)[2:-1]


def _pickled_tuple(values: Iterable[int]) -> bytes:
    """Pickles a tuple of any length: a mark, the values, the opcode that gathers them."""
    return b"(" + b"".join(map(_pickled, values)) + b"t"


def _pickled_tensor(key: str, array: np.ndarray) -> bytes:
    """Pickles the call that rebuilds a contiguous tensor from its storage."""
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    storage_type = STORAGE_NAMES[array.dtype].encode()
    return b"".join(
        [
            b"ctorch._utils\n_rebuild_tensor_v2\n(",
            # The storage, as a persistent id: ("storage", type, key, device, count).
            b"(",
            _pickled("storage"),
            b"ctorch\n" + storage_type + b"\n",
            _pickled(key),
            _pickled("cpu"),
            _pickled(array.size),
            b"tQ",
            # Then the offset, the shape, the strides, requires_grad and the backward hooks.
            _pickled(0),
            _pickled_tuple(array.shape),
            _pickled_tuple(strides),
            _pickled(False),
            b"ccollections\nOrderedDict\n)R",
            b"tR",
        ]
    )


def _add_entry(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Adds one stored entry whose data begin at a multiple of the alignment, for memory maps."""
    info = zipfile.ZipInfo(f"archive/{name}")
    assert archive.fp is not None
    # `zipfile` gives an entry a longer header by the same margin.
    is_long = len(data) * 1.05 > zipfile.ZIP64_LIMIT
    header = _LOCAL_HEADER + len(info.filename) + (20 if is_long else 0)
    # The padding is an extra field, which begins with two bytes of name and two of length.
    start = archive.fp.tell() + header + 4
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    archive.writestr(info, data)


def write_pth(path: str | Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a file that `torch.load(weights_only=True)` reads, also with `mmap`.

    A write that fails leaves what was there before. Arrays are taken from `tensors` one at a time,
    so that a lazy iterable needs memory for one.

    Raises:
        ValueError: a dtype that has no PyTorch storage, or a folder that does not exist.
    """
    with atomic_write(Path(path)) as file:
        dump_pth(file, tensors)


def dump_pth(file: BinaryIO, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes the bytes of a .pth file into an open file.

    Raises:
        ValueError: a dtype that has no PyTorch storage.
    """
    digest = ContentDigest()
    with zipfile.ZipFile(file, "w") as archive:
        # Protocol 2, an empty dict, a mark; the items follow, and SETITEMS and STOP at the end.
        program = [b"\x80\x02}("]
        for number, (name, array) in enumerate(tensors):
            if array.dtype not in STORAGE_NAMES:
                raise ValueError(
                    f"write_pth: `{name}` must have a dtype of PyTorch's; got {array.dtype}."
                )
            # `ascontiguousarray` would make a scalar a vector of one; the shape is kept apart.
            contiguous = np.ascontiguousarray(array)
            _add_entry(
                archive, f"data/{number}", contiguous.reshape(-1).view(np.uint8).data
            )
            shaped = contiguous.reshape(array.shape)
            program.append(_pickled(name))
            program.append(_pickled_tensor(str(number), shaped))
            digest.add(name, shaped)
        program.append(b"u.")
        # PyTorch writes the pickle first; readers find entries by name, and we know it only now.
        _add_entry(archive, "data.pkl", b"".join(program))
        _add_entry(archive, "byteorder", b"little")
        _add_entry(archive, "version", b"3\n")
        _add_entry(archive, _DIGEST_ENTRY, digest.hexdigest().encode())
