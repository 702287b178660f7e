"""PyTorch's zip checkpoints: a reader that memory-maps and executes nothing, and a writer.

A `.pth` file is a zip archive with one pickle and one entry for each storage.
Source: pytorch/pytorch torch/serialization.py (the layout).
"""

import bisect
import io
import itertools
import json
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
from rwkv7_jax.json_files import parse_json

# A 13B model's pickle has about 200 kB; a much larger one is not a checkpoint.
_PICKLE_LIMIT = 16 << 20

# Largest size in bytes of the zip's central directory.
_DIRECTORY_LIMIT = 2 << 20

# Alignment of the data in the file, so that memory-mapped arrays are aligned for every dtype.
_ALIGNMENT = 64

# Longest reason, in characters, in an error message.
_MESSAGE_LIMIT = 160

# The prefix of the storages' entries.
_DATA = "data/"

# Bytes of an entry's local header, before its name.
_LOCAL_HEADER = 30

# Our own entries; other readers ignore them.
_DIGEST_ENTRY = "rwkv7_jax.digest"
_METADATA_ENTRY = "rwkv7_jax.metadata"


class _LimitedReads(io.FileIO):
    """File that limits how much `zipfile` reads for a central directory, however large it is."""

    def read(self, size: int | None = -1) -> bytes:
        """Reads at most the limit; the few reads without a size begin near the file's end."""
        if size is not None and size > _DIRECTORY_LIMIT:
            raise ValueError("its list of entries is longer than any checkpoint's")
        return super().read(size)


class StorageSums:
    """The CRC-32 checksums of a file's storages; each is checked once, when a tensor in it is read.

    Reading a tensor fetches its bytes from disk anyway, so the check costs little. A file is never
    read only for its checksums.
    """

    def __init__(self, path: Path, entries: Mapping[str, tuple[memoryview, int]]):
        """Starts with no checksum checked.

        Args:
            path: path of the file.
            entries: the entries of the file with their CRC-32.
        """
        self._path = path
        self._entries = entries
        # Storages by mapped address, because a tensor does not know its storage.
        self._names: dict[int, str] = {}
        for name, (view, _) in entries.items():
            if name.startswith(_DATA) and len(view):
                self._names[np.frombuffer(view, np.uint8).ctypes.data] = name
        self._starts = sorted(self._names)
        self._compared: set[str] = set()

    def check(self, name: str, array: np.ndarray) -> None:
        """Raises unless the storage of a tensor matches its checksum.

        Args:
            name: name of the tensor, for the error message.
            array: a view of the file.

        Raises:
            ValueError: the checksum differs; the message names the file and the tensor.
        """
        try:
            self._compare_tensor(name, array)
        except ValueError as error:
            raise _refusal(self._path, error) from None

    def check_all(self, content: Any) -> None:
        """Raises unless every storage of the file matches its checksum.

        Args:
            content: the unpickled content of the file.

        Raises:
            ValueError: a checksum differs; the message is only the reason.
        """
        for name, array in _named_tensors(content):
            self._compare_tensor(name, array)
        # Storages whose tensors have no name, such as those in a list.
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
    """Lists the distinct dicts in a dict; a small file may refer to one dict thousands of times."""
    found = {}
    for value in content.values():
        if isinstance(value, dict):
            found[id(value)] = value
    return list(found.values())


def _named_tensors(content: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a dict and of the dicts in it, with their names."""
    # No deeper: trainers wrap a model once, and a malicious file may nest without end.
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
        _refuse_other_archives(archive.namelist())
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
    # Overlapping entries let a small file expand into a large one.
    spans.sort()
    for (_, end), (next_start, _) in itertools.pairwise(spans):
        if end > next_start:
            raise ValueError("its entries overlap")
    return entries


def _refuse_other_archives(names: list[str]) -> None:
    """Raises if an archive's entries are not those of a checkpoint of PyTorch."""
    if any(name.endswith(".npy") for name in names):
        raise ValueError(
            "it is an archive of NumPy (.npz): save its arrays as .safetensors"
        )
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(
            "it is a TorchScript program: load it with torch.jit.load and save its state_dict"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError(
            "it is a zip archive, but not of PyTorch "
            f"(it holds {min(names, default='nothing')}): unpack it first"
        )


def _split_name(filename: str) -> tuple[str, str]:
    """Splits an entry's name into the archive's folder and the rest."""
    folder, *rest = filename.split("/")
    if not folder or not rest or "\\" in filename or ".." in (folder, *rest):
        raise ValueError(f"its entry {filename!r} is not a path inside the archive")
    return folder, "/".join(rest)


def _data_span(info: zipfile.ZipInfo, data: mmap.mmap) -> tuple[int, int]:
    """Finds where an entry's data begins and ends in the file."""
    # PyTorch stores entries uncompressed, and compressed data could not be memory-mapped.
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"its entry {info.filename!r} is compressed or encrypted")
    header = data[info.header_offset : info.header_offset + _LOCAL_HEADER]
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise ValueError(
            f"its entry {info.filename!r} is damaged: its header is missing"
        )
    # The lengths in the central directory may differ from those in the local header.
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
    """Reads a PyTorch checkpoint: flat or nested dicts of read-only views of the mapped file.

    bfloat16 becomes `ml_dtypes.bfloat16`. Parameters become plain arrays; ordered dicts and
    counters become dicts. Dtypes, devices, bytes and tensors of other dtypes become names.

    Args:
        path: a file in the zip format of `torch.save` (PyTorch 1.6 and newer).
        verify: check every entry against its CRC-32 and the arrays against the file's digest; reads
            the whole file.

    Raises:
        ValueError: the file is not in this format, is damaged, or its pickle uses a forbidden name,
            which the message contains.
    """
    return open_pth(Path(path), verify=verify)[0]


def open_pth(path: Path, *, verify: bool = False) -> tuple[Any, StorageSums]:
    """Reads a checkpoint like `read_pth`, and returns the checksums to check tensor by tensor.

    Args:
        path: path of the file.
        verify: check the whole file at once, like `read_pth`.

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
    # The errors of a malformed pickle: stack or memo underflow, or wrong operand types.
    except (
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        struct.error,
    ):
        raise ValueError(f"`{path}` is refused: its pickle is malformed.") from None


def _refusal(path: Path, reason: Exception) -> ValueError:
    """Builds the error for a rejected file."""
    return ValueError(f"`{path}` is refused: {_printable(reason)}.")


def _refuse_other_files(path: Path) -> None:
    """Raises unless the bytes are those of a complete zip archive."""
    sentence = file_signatures.describe_other_file(path)
    container = file_signatures.container_of(path)
    if sentence is None and container == "safetensors":
        sentence = (
            "holds safetensors: rename it to .safetensors (web-rwkv's files to .st)"
        )
    # `is_zipfile` looks for the central directory at the file's end.
    elif sentence is None and not zipfile.is_zipfile(path):
        if container == "pth":
            sentence = file_signatures.describe_cut_zip(path)
        else:
            sentence = "is not a zip file, as PyTorch's files are; it may be damaged"
    if sentence is not None:
        raise ValueError(f"`{path}` {sentence}.")


def _read(path: Path, verify: bool) -> tuple[Any, StorageSums]:
    """Reads a checkpoint; its error messages are only the reason."""
    # Memory-mapped, because a copy of a 13B model would cost 26 GB.
    data = map_file(path)
    entries = _entries(path, data)
    program = bytes(_content(entries, "data.pkl")[: _PICKLE_LIMIT + 1])
    if not program or len(program) > _PICKLE_LIMIT:
        raise ValueError("its data.pkl is missing, empty or too large")
    if "byteorder" in entries and bytes(_content(entries, "byteorder")) != b"little":
        raise ValueError("it is not in little-endian order")
    # The small entries are always checked: a damaged pickle could give wrong names and shapes.
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
    """Returns the bytes of an entry; empty if the entry is missing."""
    return entries[name][0] if name in entries else memoryview(b"")


def _check_crc(
    entries: Mapping[str, tuple[memoryview, int]], name: str, subject: str
) -> None:
    """Raises unless an entry matches the CRC-32 in the central directory.

    Args:
        entries: the entries of the file.
        name: name of the entry.
        subject: description of the entry, for the error message.
    """
    view, expected = entries[name]
    # PyTorch can be configured not to compute checksums, and then writes 0.
    if expected and zlib.crc32(view) != expected:
        raise ValueError(
            f"its {subject} is damaged (its CRC-32 differs); download or copy it again"
        )


def _check_digest(content: Any, expected: bytes) -> None:
    """Raises unless the arrays match the digest that `write_pth` stored in the file."""
    if digest_of_arrays(content.items()).encode() != expected:
        raise ValueError(
            "its tensors are not those that were written (their digest differs)"
        )


def has_digest(path: Path) -> bool:
    """Returns whether a readable .pth file holds a digest of its tensors."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(f"/{_DIGEST_ENTRY}") for name in archive.namelist())


def read_pth_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata that `write_pth` stored in a readable file; empty if there is none.

    Raises:
        ValueError: the metadata is damaged.
    """
    metadata: Any = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(f"/{_METADATA_ENTRY}"):
                metadata = parse_json(archive.read(name))
    if not isinstance(metadata, dict):
        raise ValueError(f"its metadata must be an object; got {metadata!r:.40}")
    return metadata


def _printable(error: Exception) -> str:
    """Shortens a reason to one printable line: names in a malicious file may hold anything."""
    text = ""
    for character in str(error)[:_MESSAGE_LIMIT]:
        text += character if character.isprintable() else "?"
    return text.rstrip(".")


def _pickled(value: str | int | bool) -> bytes:
    """Pickles one value without the leading PROTO and the trailing STOP opcode."""
    return pickle.dumps(value, 2)[2:-1]


def _pickled_tuple(values: Iterable[int]) -> bytes:
    """Pickles a tuple of any length: MARK, the values, TUPLE."""
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
    """Adds one uncompressed entry whose data is aligned for memory-mapping."""
    info = zipfile.ZipInfo(f"archive/{name}")
    assert archive.fp is not None
    # `zipfile` uses the same margin to choose the longer ZIP64 header.
    is_long = len(data) * 1.05 > zipfile.ZIP64_LIMIT
    header = _LOCAL_HEADER + len(info.filename) + (20 if is_long else 0)
    # The padding is an extra field, which starts with a two-byte id and a two-byte length.
    start = archive.fp.tell() + header + 4
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    archive.writestr(info, data)


def write_pth(
    path: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file atomically that `torch.load(weights_only=True)` reads, also with `mmap=True`.

    Arrays are taken from `tensors` one at a time, so a lazy iterable needs memory for only one.

    Args:
        path: path of the file.
        tensors: names and arrays.
        metadata: strings for `read_pth_metadata`, which PyTorch ignores.

    Raises:
        ValueError: PyTorch has no storage for a dtype, or the folder does not exist.
    """
    with atomic_write(Path(path)) as file:
        dump_pth(file, tensors, metadata=metadata)


def dump_pth(
    file: BinaryIO,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the bytes of a .pth file into an open file.

    Raises:
        ValueError: PyTorch has no storage for a dtype.
    """
    digest = ContentDigest()
    with zipfile.ZipFile(file, "w") as archive:
        # PROTO 2, EMPTY_DICT and MARK; the items follow, then SETITEMS and STOP.
        program = [b"\x80\x02}("]
        for number, (name, array) in enumerate(tensors):
            if array.dtype not in STORAGE_NAMES:
                raise ValueError(
                    f"write_pth: `{name}` must have a dtype that PyTorch stores; got {array.dtype}."
                )
            # `ascontiguousarray` turns a scalar into a vector, so the shape is restored below.
            contiguous = np.ascontiguousarray(array)
            _add_entry(
                archive, f"data/{number}", contiguous.reshape(-1).view(np.uint8).data
            )
            shaped = contiguous.reshape(array.shape)
            program.append(_pickled(name))
            program.append(_pickled_tensor(str(number), shaped))
            digest.add(name, shaped)
        program.append(b"u.")
        # PyTorch writes the pickle first, but it is complete only now; entries are found by name.
        _add_entry(archive, "data.pkl", b"".join(program))
        _add_entry(archive, "byteorder", b"little")
        _add_entry(archive, "version", b"3\n")
        _add_entry(archive, _DIGEST_ENTRY, digest.hexdigest().encode())
        if metadata:
            _add_entry(archive, _METADATA_ENTRY, json.dumps(metadata).encode())
