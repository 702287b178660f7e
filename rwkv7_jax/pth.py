"""PyTorch's zip checkpoints, read by memory map without running what they say, and written. Level 1.

A `.pth` file is a zip with one pickle and one entry per storage. The pickle is a program; here it is walked
opcode by opcode, and the only names it may use are those of tensors, storages and ordered dicts. Nothing it
names is ever imported or called. Source: pytorch/pytorch torch/serialization.py (the layout).
"""

import math
import mmap
import os
import pickle
import pickletools
import struct
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = ("torch._utils", "_rebuild_parameter")
_ORDERED = ("collections", "OrderedDict")
_ALLOWED = {_TENSOR, _PARAMETER, _ORDERED, *(("torch", name) for name in _STORAGES)}
# A 13B model's pickle has some 200 kB; what is larger is no checkpoint.
_PICKLE_LIMIT = 16 << 20
_ALIGNMENT = 64


class _Global(NamedTuple):
    """A name that the pickle used; never looked up."""

    module: str
    name: str


class _Storage(NamedTuple):
    dtype: np.dtype
    array: np.ndarray


_MARK = object()


class _Machine:
    """The part of a pickle machine that checkpoints need; any other opcode is refused."""

    def __init__(self, storages: dict[str, memoryview]):
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._storages = storages

    def run(self, program: bytes) -> Any:
        """What the program builds, or a ValueError that says what is wrong with it."""
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("its pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        push, pop = self._stack.append, self._stack.pop
        if name in _CONSTANTS:
            push(_CONSTANTS[name]())
        elif name in _LITERALS:
            push(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            push(self._memo[argument])
        elif name == "GLOBAL":
            push(_allowed(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            inner, outer = pop(), pop()
            push(_allowed(str(outer), str(inner)))
        elif name in _TUPLES:
            push(tuple(reversed([pop() for _ in range(_TUPLES[name])])))
        elif name == "TUPLE":
            push(tuple(self._since_mark()))
        elif name == "BINPERSID":
            push(self._storage(pop()))
        elif name == "REDUCE":
            arguments = pop()
            push(self._build(pop(), arguments))
        elif name == "BUILD":
            pop()  # The attributes of an ordered dict (its `_metadata`) are of no use here.
            if not isinstance(self._stack[-1], dict):
                raise ValueError("it sets the attributes of something that is no dict")
        elif name in _FILLERS:
            self._fill(name)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle uses {name}, which no checkpoint needs")

    def _since_mark(self) -> list[Any]:
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _fill(self, name: str) -> None:
        many = name in ("SETITEMS", "APPENDS")
        size = 2 if name == "SETITEM" else 1
        items = self._since_mark() if many else [self._stack.pop() for _ in range(size)][::-1]
        target = self._stack[-1]
        if name.startswith("APPEND") and isinstance(target, list):
            target.extend(items)
        elif name.startswith("SETITEM") and isinstance(target, dict) and len(items) % 2 == 0:
            keys = items[::2]
            # Hashing a deeply nested tuple would exhaust the C stack.
            if not all(isinstance(key, (str, int)) for key in keys):
                raise ValueError("it has a dict whose keys are no names")
            target.update(zip(keys, items[1::2], strict=True))
        else:
            raise ValueError("its pickle fills something that is no list or dict")

    def _storage(self, description: Any) -> _Storage:
        if not (isinstance(description, tuple) and len(description) == 5):
            raise ValueError("it describes a storage in an unknown way")
        _, kind, key, _, count = description
        if not (isinstance(kind, _Global) and kind.name in _STORAGES and isinstance(key, str)):
            raise ValueError("it describes a storage in an unknown way")
        dtype = _STORAGES[kind.name]
        if key not in self._storages:
            raise ValueError(f"it has no data/{key}")
        data = self._storages[key]
        if not (isinstance(count, int) and 0 <= count * dtype.itemsize <= len(data)):
            raise ValueError(f"data/{key} is too small for {count} numbers")
        return _Storage(dtype, np.frombuffer(data, dtype, count))

    def _build(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that is no name")
        if function == _ORDERED and all(isinstance(a, list) and not a for a in arguments):
            return {}
        if function == _PARAMETER and arguments and isinstance(arguments[0], np.ndarray):
            return arguments[0]
        if function == _TENSOR and len(arguments) >= 4 and isinstance(arguments[0], _Storage):
            return _tensor(*arguments[:4])
        raise ValueError(f"it calls `{function.module}.{function.name}` in an unknown way")


_CONSTANTS = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_LITERALS = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FILLERS = frozenset("SETITEM SETITEMS APPEND APPENDS".split())


def _allowed(module: str, name: str) -> _Global:
    if (module, name) not in _ALLOWED:
        raise ValueError(f"it asks for `{module}.{name}`, which is not allowed in a checkpoint")
    return _Global(module, name)


def _tensor(storage: _Storage, offset: Any, shape: Any, strides: Any) -> np.ndarray:
    """A read-only view of a storage."""
    numbers = (offset, *shape, *strides) if isinstance(shape, tuple) else ()
    whole = all(isinstance(n, int) and 0 <= n < 1 << 62 for n in numbers)
    if not numbers or not whole or len(shape) != len(strides) or len(shape) > 16:
        raise ValueError("a tensor's shape is no row of sizes")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    count = math.prod(shape)
    if count and (last >= len(storage.array) or count > len(storage.array)):
        raise ValueError(f"a tensor of shape {shape} reaches out of its storage")
    steps = tuple(s * storage.dtype.itemsize for s in strides)
    base = storage.array[offset:] if count else storage.array
    return np.lib.stride_tricks.as_strided(base, shape, steps, writeable=False)


def _entries(path: Path, data: mmap.mmap) -> dict[str, memoryview]:
    """The zip's entries as views of the mapped file, by the name behind the archive's folder."""
    views, spans, whole = {}, [], memoryview(data)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            parts = info.filename.split("/")
            if ".." in parts or not parts[0] or "\\" in info.filename or len(parts) < 2:
                raise ValueError(f"its entry {info.filename!r} is no place inside the archive")
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
    if any(end > start for (_, end), (start, _) in zip(spans, spans[1:], strict=False)):
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
        return _Machine(storages).run(program)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        reason = str(error) if type(error) is ValueError else "its pickle is broken"
        raise ValueError(f"read_pth: `{path}` is refused: {reason}.") from None
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, UnicodeError) as error:
        raise ValueError(f"read_pth: `{path}` is refused: {error}.") from None


def _pickled(value: str | int | bool) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def _pickled_tuple(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_pickled, values)) + b"t"


def _pickled_tensor(key: str, array: np.ndarray) -> bytes:
    """The call that rebuilds a contiguous tensor from its storage."""
    storage = _STORAGE_NAMES[array.dtype].encode()
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
    long = 20 if len(data) > zipfile.ZIP64_LIMIT else 0
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
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"write_pth: the folder of `{path}` does not exist.")
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            program = [b"\x80\x02}("]
            for number, (name, array) in enumerate(tensors):
                if array.dtype not in _STORAGE_NAMES:
                    raise ValueError(f"write_pth: `{name}` has dtype {array.dtype}, unknown there.")
                shape, array = array.shape, np.ascontiguousarray(array)
                _put(archive, f"data/{number}", memoryview(array.reshape(-1).view(np.uint8)))
                program.append(_pickled(name) + _pickled_tensor(str(number), array.reshape(shape)))
            _put(archive, "data.pkl", b"".join([*program, b"u."]))
            _put(archive, "byteorder", b"little")
            _put(archive, "version", b"3\n")
        Path(partial).chmod(0o644)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
