"""A safe interpreter for the pickles inside PyTorch checkpoints.

A pickle is a program. This module interprets it opcode by opcode and allows only the names of
tensors, storages and dicts, and of things such as dtypes and devices, which stay names. It never
imports or calls anything that a pickle names.
"""

import io
import math
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rwkv7_jax.checkpoints.pickle_names import (
    ALLOWED_NAMES,
    COUNTER,
    OPAQUE_CALLS,
    ORDERED_DICT,
    OTHER_STORAGES,
    OTHER_TENSORS,
    REBUILD_OF_DTYPE,
    REBUILD_PARAMETERS,
    REBUILD_TENSOR,
    REBUILD_WITH_ATTRIBUTES,
    SEQUENCES,
    STORAGES,
)

# A 13B model takes about 75,000 steps. Unlimited, a 16 MB file could build 1.3 GB of empty dicts.
_STEP_LIMIT = 250_000

# The tensors together may have this many times the bytes of all storages. Tied weights share a
# storage; thousands of matrices over a few bytes are a memory bomb.
_SHARING_LIMIT = 8

# Bytes that the tensors may always have, however small the storages are.
_ALWAYS_ALLOWED = 64 << 20

_MAX_AXES = 16

# Most arguments of a call whose result is ignored.
_MOST_ARGUMENTS = 16

# Larger sizes, offsets and strides would overflow in NumPy.
_MAX_NUMBER = 1 << 62

# Longest rejected name, in characters, in a message; the advice after it must stay visible.
_NAME_LIMIT = 56


class _Global(NamedTuple):
    """A global name in the pickle; it is never imported."""

    module: str
    name: str


class _Storage(NamedTuple):
    """A storage as a flat array over the file."""

    dtype: np.dtype
    array: np.ndarray


class UnreadTensor(NamedTuple):
    """A tensor or a storage whose data is not read.

    Attributes:
        kind: its dtype, or "sparse", "quantised" or "meta".
    """

    kind: str


_MARK = object()


class RestrictedUnpickler:
    """The subset of a pickle interpreter that checkpoints need; rejects all other opcodes.

    Stack and memo may underflow in a malformed program, so the caller must catch `LookupError`.
    """

    def __init__(self, storages: dict[str, memoryview]):
        """Starts with an empty stack.

        Args:
            storages: the bytes of each storage, by key.
        """
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._storages = storages
        num_bytes = sum(map(len, storages.values()))
        self._bytes_left = max(_ALWAYS_ALLOWED, _SHARING_LIMIT * num_bytes)

    def run(self, program: bytes) -> Any:
        """Interprets a program and returns what it builds.

        Raises:
            ValueError: the program is rejected; the message is only the reason.
        """
        file = io.BytesIO(program)
        for _ in range(_STEP_LIMIT):
            code = file.read(1)
            opcode = _OPCODES.get(code)
            # Anything after the first STOP is not part of the program.
            if opcode is not None and opcode.name == "STOP":
                return self._stack.pop()
            # Checked before its argument is read: some readers parse long strings.
            if opcode is None or opcode.name not in _EFFECTS:
                name = opcode.name if opcode else code.hex() or "nothing at its end"
                raise ValueError(f"its pickle uses {name}, which no checkpoint needs")
            argument = None
            if opcode.name == "GLOBAL":
                argument = _read_global(file)
            elif opcode.arg is not None:
                argument = opcode.arg.reader(file)
            _EFFECTS[opcode.name](self, argument)
        raise ValueError(f"its pickle takes more than {_STEP_LIMIT} steps")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_many(self, count: int) -> list[Any]:
        """Pops a number of values and returns them in the order in which they were pushed."""
        values = [self._stack.pop() for _ in range(count)]
        return values[::-1]

    def _pop_to_mark(self) -> list[Any]:
        """Pops the values after the last mark, and the mark."""
        values = []
        value = self._stack.pop()
        while value is not _MARK:
            values.append(value)
            value = self._stack.pop()
        return values[::-1]

    def _put(self, key: int) -> None:
        """Stores the top of the stack in the memo."""
        self._memo[key] = self._stack[-1]

    def _build(self) -> None:
        """Drops the attributes of an ordered dict, whose `_metadata` is not needed."""
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            raise ValueError("it sets the attributes of something that is not a dict")

    def _extend_list(self, values: list[Any]) -> None:
        """Appends to the list on top of the stack."""
        target = self._stack[-1]
        if not isinstance(target, list):
            raise ValueError("its pickle appends to something that is not a list")
        target.extend(values)

    def _update_dict(self, items: list[Any]) -> None:
        """Sets alternating keys and values in the dict on top of the stack."""
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("its pickle sets items of something that is not a dict")
        keys = items[::2]
        for key in keys:
            # Hashing a deeply nested tuple would exhaust the C stack.
            if not isinstance(key, str | bytes | int | float | None | _Global):
                raise ValueError("it has a dict whose keys are not names or numbers")
        target.update(zip(keys, items[1::2], strict=True))

    def _storage(self, description: Any) -> _Storage | UnreadTensor:
        """Returns the storage that a persistent id describes."""
        if not (isinstance(description, tuple) and len(description) == 5):
            raise ValueError("it describes a storage in an unknown way")
        _, kind, key, _, count = description
        if isinstance(kind, _Global) and kind.name in OTHER_STORAGES:
            return UnreadTensor(OTHER_STORAGES[kind.name])
        if not (
            isinstance(kind, _Global) and kind.name in STORAGES and isinstance(key, str)
        ):
            raise ValueError("it describes a storage in an unknown way")
        dtype = STORAGES[kind.name]
        if key not in self._storages:
            raise ValueError(f"it has no data/{key}")
        data = self._storages[key]
        if not (isinstance(count, int) and 0 <= count * dtype.itemsize <= len(data)):
            raise ValueError(f"data/{key} is too small for {count} numbers")
        # The bytes stay in the file until a tensor is used.
        return _Storage(dtype, np.frombuffer(data, dtype, count))

    def _call(self, function: Any, arguments: Any) -> Any:
        """Returns the result of one of the known functions."""
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that is not a name")
        if function in (ORDERED_DICT, COUNTER) and arguments in ((), ([],)):
            return {}
        if function == COUNTER and len(arguments) == 1:
            # No copy, because endless calls would copy one large dict as often.
            if isinstance(arguments[0], dict):
                return arguments[0]
        # Shapes and sets of names, which trainers store next to the tensors; not copied either.
        if function in SEQUENCES and len(arguments) == 1:
            if isinstance(arguments[0], tuple | list):
                return arguments[0]
        if function in OPAQUE_CALLS and _are_plain(arguments):
            return function
        if function == REBUILD_WITH_ATTRIBUTES and len(arguments) == 4:
            function, _, arguments, _ = arguments
        tensor = self._rebuilt(function, arguments)
        if tensor is not None:
            return tensor
        name = ".".join(function) if isinstance(function, _Global) else "a tensor"
        raise ValueError(f"it calls `{name}` in an unknown way")

    def _rebuilt(
        self, function: Any, arguments: Any
    ) -> np.ndarray | UnreadTensor | None:
        """Returns the tensor that a rebuild function gives; None for any other function."""
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            return None
        # The other arguments are `requires_grad`, hooks and attributes.
        if function in REBUILD_PARAMETERS and arguments:
            if isinstance(arguments[0], np.ndarray | UnreadTensor):
                return arguments[0]
        if function == REBUILD_TENSOR and len(arguments) >= 4:
            storage, offset, shape, strides = arguments[:4]
            if isinstance(storage, UnreadTensor):
                return storage
            if isinstance(storage, _Storage):
                return self._tensor(storage, offset, shape, strides)
        if function == REBUILD_OF_DTYPE and len(arguments) >= 7:
            if isinstance(arguments[6], _Global):
                return UnreadTensor(arguments[6].name)
        if function in OTHER_TENSORS:
            return UnreadTensor(OTHER_TENSORS[function])
        return None

    def _tensor(
        self, storage: _Storage, offset: Any, shape: Any, strides: Any
    ) -> np.ndarray:
        """Returns a read-only view of a storage and counts its bytes towards the limit."""
        tensor = _strided_view(storage, offset, shape, strides)
        self._bytes_left -= tensor.nbytes
        if self._bytes_left < 0:
            raise ValueError(
                "its tensors overlap so much that they expand to many times the file's size"
            )
        return tensor


# Opcodes that push their argument.
_LITERALS = (
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINUNICODE8",
)

# What each supported opcode does, given the machine and the opcode's argument.
_EFFECTS: dict[str, Callable[[RestrictedUnpickler, Any], None]] = {
    # The protocol and the frames do not matter here.
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    **dict.fromkeys(_LITERALS, RestrictedUnpickler._push),
    "NONE": lambda machine, _: machine._push(None),
    "NEWTRUE": lambda machine, _: machine._push(True),
    "NEWFALSE": lambda machine, _: machine._push(False),
    "MARK": lambda machine, _: machine._push(_MARK),
    "EMPTY_DICT": lambda machine, _: machine._push({}),
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "EMPTY_TUPLE": lambda machine, _: machine._push(()),
    "TUPLE1": lambda machine, _: machine._push(tuple(machine._pop_many(1))),
    "TUPLE2": lambda machine, _: machine._push(tuple(machine._pop_many(2))),
    "TUPLE3": lambda machine, _: machine._push(tuple(machine._pop_many(3))),
    "TUPLE": lambda machine, _: machine._push(tuple(machine._pop_to_mark())),
    "BINPUT": RestrictedUnpickler._put,
    "LONG_BINPUT": RestrictedUnpickler._put,
    "MEMOIZE": lambda machine, _: machine._put(len(machine._memo)),
    "BINGET": lambda machine, key: machine._push(machine._memo[key]),
    "LONG_BINGET": lambda machine, key: machine._push(machine._memo[key]),
    "GLOBAL": lambda machine, name: machine._push(_allowed(*name)),
    "STACK_GLOBAL": lambda machine, _: machine._push(_allowed(*machine._pop_many(2))),
    "BINPERSID": lambda machine, _: machine._push(
        machine._storage(*machine._pop_many(1))
    ),
    "REDUCE": lambda machine, _: machine._push(machine._call(*machine._pop_many(2))),
    "BUILD": lambda machine, _: machine._build(),
    "APPEND": lambda machine, _: machine._extend_list(machine._pop_many(1)),
    "APPENDS": lambda machine, _: machine._extend_list(machine._pop_to_mark()),
    "SETITEM": lambda machine, _: machine._update_dict(machine._pop_many(2)),
    "SETITEMS": lambda machine, _: machine._update_dict(machine._pop_to_mark()),
}

_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


def _read_global(file: io.BytesIO) -> tuple[str, str]:
    """Reads two lines verbatim; the standard reader would decode escapes."""
    module = file.readline().rstrip(b"\n").decode("latin-1")
    name = file.readline().rstrip(b"\n").decode("latin-1")
    return module, name


def _allowed(module: Any, name: Any) -> _Global:
    """Returns a global name, or rejects one that checkpoints do not need."""
    # Printing anything but a name could expand a memo bomb.
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("it asks for something that is not a name")
    if (module, name) not in ALLOWED_NAMES:
        shown = f"{module}.{name}"[:_NAME_LIMIT]
        raise ValueError(
            f"it asks for `{shown}`, which is not allowed in a checkpoint: load it with PyTorch "
            "and save only its state_dict"
        )
    return _Global(module, name)


def _are_plain(arguments: tuple[Any, ...]) -> bool:
    """Returns whether a call's arguments are only strings, numbers and names, as for devices."""
    # Otherwise endless calls on one large tuple would take hours.
    if len(arguments) > _MOST_ARGUMENTS:
        return False
    plain = str | bytes | int | float | _Global
    return all(isinstance(value, plain) for value in arguments)


def _is_size(number: Any) -> bool:
    """Returns whether a value can be a size, an offset or a stride."""
    return isinstance(number, int) and 0 <= number < _MAX_NUMBER


def _strided_view(
    storage: _Storage, offset: Any, shape: Any, strides: Any
) -> np.ndarray:
    """Returns a read-only view of a storage; offset and strides count elements, not bytes."""
    if not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor's shape is not a tuple of sizes")
    if len(shape) != len(strides) or len(shape) > _MAX_AXES:
        raise ValueError("a tensor's shape is not a tuple of sizes")
    if not all(map(_is_size, (offset, *shape, *strides))):
        raise ValueError("a tensor's shape is not a tuple of sizes")
    last = offset
    for size, stride in zip(shape, strides, strict=True):
        last += (size - 1) * stride
    count = math.prod(shape)
    available = len(storage.array)
    # The second condition: strides of 0 would turn one element into any number of elements.
    if count and (last >= available or count > available):
        raise ValueError(
            f"a tensor of shape {shape} extends past the end of its storage"
        )
    steps = [stride * storage.dtype.itemsize for stride in strides]
    start = storage.array[offset:] if count else storage.array
    return np.lib.stride_tricks.as_strided(start, shape, steps, writeable=False)
