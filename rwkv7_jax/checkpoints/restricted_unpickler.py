"""The pickles inside PyTorch checkpoints, walked without running what they say.

A pickle is a program. Here it goes opcode by opcode, and the only names it may use are those of
tensors, storages and ordered dicts; nothing it names is ever imported or called.
"""

import io
import math
import pickletools
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# What a storage of each PyTorch type holds.
STORAGES = {
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

STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}

# A 13B model takes some 75,000 steps; without a limit a file of 16 MB builds 1.3 GB of empty dicts.
_STEP_LIMIT = 250_000

# Tied weights share a storage; a few bytes that pose as thousands of matrices are a bomb.
_SHARING_LIMIT = 8

_SMALL = 64 << 20

_TENSOR = ("torch._utils", "_rebuild_tensor_v2")

_PARAMETER = ("torch._utils", "_rebuild_parameter")

_ORDERED = ("collections", "OrderedDict")

_ALLOWED = {_TENSOR, _PARAMETER, _ORDERED, *(("torch", name) for name in STORAGES)}


class _Global(NamedTuple):
    """A name that the pickle used; never looked up."""

    module: str
    name: str


class _Storage(NamedTuple):
    dtype: np.dtype
    array: np.ndarray


_MARK = object()


class RestrictedUnpickler:
    """The part of a pickle machine that checkpoints need; any other opcode is refused."""

    def __init__(self, storages: dict[str, memoryview]):
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._storages = storages
        self._room = max(_SMALL, _SHARING_LIMIT * sum(map(len, storages.values())))

    def run(self, program: bytes) -> Any:
        """What the program builds, or a ValueError that says what is wrong with it."""
        file = io.BytesIO(program)
        for _ in range(_STEP_LIMIT):
            code = file.read(1)
            if code not in _OPCODES:
                found = _ALL_OPCODES.get(code, code.hex() or "nothing at its end")
                raise ValueError(f"its pickle uses {found}, which no checkpoint needs")
            opcode = _OPCODES[code]
            if opcode.name == "STOP":
                return self._stack.pop()
            reader = _read_name if opcode.name == "GLOBAL" else opcode.arg and opcode.arg.reader
            self._step(opcode.name, reader and reader(file))
        raise ValueError(f"its pickle takes more than {_STEP_LIMIT} steps")

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
            push(_allowed(*argument))
        elif name == "STACK_GLOBAL":
            inner, outer = pop(), pop()
            push(_allowed(outer, inner))
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
        if not (isinstance(kind, _Global) and kind.name in STORAGES and isinstance(key, str)):
            raise ValueError("it describes a storage in an unknown way")
        dtype = STORAGES[kind.name]
        if key not in self._storages:
            raise ValueError(f"it has no data/{key}")
        data = self._storages[key]
        if not (isinstance(count, int) and 0 <= count * dtype.itemsize <= len(data)):
            raise ValueError(f"data/{key} is too small for {count} numbers")
        return _Storage(dtype, np.frombuffer(data, dtype, count))

    def _build(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that is no name")
        if function == _ORDERED and arguments in ((), ([],)):
            return {}
        if function == _PARAMETER and arguments and isinstance(arguments[0], np.ndarray):
            return arguments[0]
        if function == _TENSOR and len(arguments) >= 4 and isinstance(arguments[0], _Storage):
            tensor = _tensor(*arguments[:4])
            self._room -= tensor.nbytes
            if self._room < 0:
                raise ValueError("its tensors overlap so often that they unfold to many times it")
            return tensor
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

_OTHERS = frozenset(
    "PROTO FRAME BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL TUPLE BINPERSID"
    " REDUCE BUILD STOP".split()
)

# The argument of an opcode that is not known here is not even read: some readers parse long texts.
_OPCODES = {
    opcode.code.encode("latin-1"): opcode
    for opcode in pickletools.opcodes
    if opcode.name in {*_CONSTANTS, *_LITERALS, *_TUPLES, *_FILLERS, *_OTHERS}
}

_ALL_OPCODES = {o.code.encode("latin-1"): o.name for o in pickletools.opcodes}


def _read_name(file: io.BytesIO) -> tuple[str, str]:
    """Two lines as they are: the standard reader would undo escapes."""
    module, name = (file.readline().rstrip(b"\n").decode("latin-1") for _ in range(2))
    return module, name


def _allowed(module: Any, name: Any) -> _Global:
    # Printing what is no name could unfold a memo bomb.
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("it asks for something that is no name")
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
