"""Parses the text of compiled programs: their instructions, and how often each runs.

Only the text shows the collectives that a compiler inserts.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bits of HLO types whose name does not give them, as f8e4m3fn does.
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}

# A dynamic size has its upper bound after "<=".
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\]")

# An array and its layout, which names the memory space unless it is the device's main memory.
_PLACED = re.compile(r"\b([a-z][a-z0-9]*\[[\d,<=]*\])(\{[^}]*\})?")

_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\((.*)")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")

_CALLED = re.compile(r"(calls|to_apply|body|condition)=%?([\w.\-]+)")

# Of a conditional, by an index or by a truth value.
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_OR_FALSE = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')

_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")

_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')

_IN_PLACE = '"aliasing_operands":{"lists":[{'

# The results of a custom call or a fusion that reuse an operand, such as {{1}: (3, {})}: by their
# place in a tuple, which is empty if there is only one result.
_REUSED = re.compile(r"output_to_operand_aliasing=\{(.*?\))\}")
_RESULT = re.compile(r"\{([\d, ]*)\}: \(")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        shape: shape of its result, with layouts; a tuple in parentheses.
        operation: opcode, such as "all-gather".
        rest: operands and attributes.
    """

    shape: str
    operation: str
    rest: str

    @property
    def op_name(self) -> str:
        """The operation of the model that the instruction comes from."""
        found = _OP_NAME.search(self.rest)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def is_in_place(self) -> bool:
        """Whether the result reuses the memory of an operand."""
        return _IN_PLACE in self.rest

    @property
    def is_continued(self) -> bool:
        """Whether the instruction continues or ends an asynchronous operation."""
        return self.operation.endswith(("-update", "-done"))

    def arrays(self) -> list[tuple[str, int]]:
        """Returns shape and bytes of each result that takes new memory of the device."""
        reused = _REUSED.search(self.rest)
        places = _RESULT.findall(reused[1]) if reused else ()
        found = []
        for place, (shape, layout) in enumerate(_PLACED.findall(self.shape)):
            is_reused = "" in places or str(place) in places
            if not is_reused and not _ELSEWHERE.search(layout):
                found.append((shape, shape_bytes(shape)))
        return found


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: instructions by the name of their computation.
        entry: name of the entry computation.
    """

    computations: dict[str, list[Instruction]]
    entry: str


def shape_bytes(shape: str) -> int:
    """Computes the bytes of all arrays in a shape."""
    total = 0
    for kind, sizes in _ARRAY.findall(shape):
        bits = _BITS.get(kind)
        if bits is None:
            found = re.match(r"[a-z]+?(\d+)", kind)
            bits = int(found[1]) if found else 0
        lengths = [int(size.removeprefix("<=")) for size in sizes.split(",") if size]
        total += math.prod(lengths) * bits // 8
    return total


def parse(text: str) -> Program:
    """Parses a compiled program.

    Raises:
        ValueError: the text has no entry computation; the format may have changed.
    """
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    current: list[Instruction] = []
    for line in text.splitlines():
        if not line.startswith(" "):
            found = _COMPUTATION.match(line)
            if found:
                current = computations.setdefault(found[2], [])
                entry = found[2] if found[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if found:
            current.append(Instruction(*found.groups()))
    if not entry:
        raise ValueError("The text of the compiled program has no entry computation.")
    return Program(computations, entry)


def _trips(program: Program, rest: str, condition: str) -> int:
    """Returns the number of iterations of a loop."""
    found = _TRIPS.search(rest)
    if found:
        return int(found[1])
    # The condition compares the counter with a constant, perhaps in a called computation.
    numbers = []
    names = [condition]
    while names:
        for one in program.computations.get(names.pop(), ()):
            text = f"{one.shape} {one.operation}({one.rest}"
            numbers += map(int, _CONSTANT.findall(text))
            names += [name for _, name in _CALLED.findall(one.rest)]
    return max(numbers, default=1)


class Visit(NamedTuple):
    """An instruction in the context in which it runs.

    Attributes:
        instruction: the instruction.
        computation: name of its computation.
        times: number of executions.
        is_fused: whether it is inside a fusion or an asynchronous operation, whose result takes
            memory outside.
        is_first: whether it is in the entry computation.
    """

    instruction: Instruction
    computation: str
    times: int
    is_fused: bool
    is_first: bool


def walk(program: Program) -> Iterator[Visit]:
    """Visits the instructions of a program, computation by computation."""
    pending = [(program.entry, 1, False)]
    while pending:
        name, times, fused = pending.pop()
        for one in program.computations.get(name, ()):
            yield Visit(one, name, times, fused, name == program.entry)
            called = dict(_CALLED.findall(one.rest))
            if one.operation == "while":
                inside = times * _trips(program, one.rest, called["condition"])
                pending.append((called["body"], inside, fused))
            elif one.operation == "conditional":
                pending += [(name, times, fused) for name in _branches(one.rest)]
            elif one.is_continued:
                # Its "-start" has called the computation.
                continue
            elif "calls" in called:
                pending.append((called["calls"], times, True))
            # Other instructions, such as reductions, apply an operator to scalars.
            elif one.operation in ("call", "call-start") and "to_apply" in called:
                pending.append((called["to_apply"], times, fused))


def _branches(rest: str) -> list[str]:
    """Returns the computations of a conditional."""
    listed = _BRANCHES.search(rest)
    if listed:
        return [name.strip(" %") for name in listed[1].split(",")]
    return _TRUE_OR_FALSE.findall(rest)
