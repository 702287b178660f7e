"""Compiled programs as text: their instructions, and how often each runs.

The text is the only place that tells which collectives a compiler has made of a program. Counting
them has traps, each of which is named where it is avoided.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bits of a number, by HLO's name of its type. Others, such as f8e4m3fn, end in their bits' count.
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")

# An array and its layout, which names the memory where that is not the device's main one.
_PLACED = re.compile(r"\b([a-z][a-z0-9]*\[[\d,]*\])(\{[^}]*\})?")

_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")

_CALLED = re.compile(r"(calls|to_apply|body|condition)=%?([\w.\-]+)")

_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')

_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")

_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')

_IN_PLACE = '"aliasing_operands":{"lists":[{'


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: of its result.
        shape: of its result, with layouts; of several, in parentheses.
        operation: such as "all-gather".
        rest: operands and attributes.
    """

    name: str
    shape: str
    operation: str
    rest: str

    @property
    def bytes(self) -> int:
        """The bytes of its result."""
        return shape_bytes(self.shape)

    @property
    def op_name(self) -> str:
        """The operation of the model that it comes from."""
        found = _OP_NAME.search(self.rest)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def is_in_place(self) -> bool:
        """Whether its result lies where an operand lay."""
        return _IN_PLACE in self.rest

    def arrays(self) -> list[tuple[str, int]]:
        """Returns shape and bytes of each result that lies in the device's main memory."""
        found = []
        for shape, layout in _PLACED.findall(self.shape):
            if not _ELSEWHERE.search(layout):
                found.append((shape, shape_bytes(shape)))
        return found


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: instructions by the name of their computation.
        entry: name of the first computation.
    """

    computations: dict[str, list[Instruction]]
    entry: str


def shape_bytes(shape: str) -> int:
    """Computes the bytes of a shape, or of several."""
    total = 0
    for kind, sizes in _ARRAY.findall(shape):
        bits = _BITS.get(kind)
        if bits is None:
            found = re.match(r"[a-z]+?(\d+)", kind)
            bits = int(found[1]) if found else 0
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def parse(text: str) -> Program:
    """Reads a compiled program.

    Raises:
        ValueError: it has no entry, as where a compiler's output has changed.
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
        raise ValueError("The compiled program's text has no entry.")
    return Program(computations, entry)


def _trips(program: Program, rest: str, condition: str) -> int:
    """Returns how often a loop runs."""
    found = _TRIPS.search(rest)
    if found:
        return int(found[1])
    # The counter is compared with a constant, here or in what is called from here.
    numbers = []
    names = [condition]
    while names:
        for one in program.computations.get(names.pop(), ()):
            text = f"{one.shape} {one.operation}({one.rest}"
            numbers += map(int, _CONSTANT.findall(text))
            names += [name for _, name in _CALLED.findall(one.rest)]
    return max(numbers, default=1)


class Visit(NamedTuple):
    """An instruction where it runs.

    Attributes:
        instruction: itself.
        computation: name of the one that it is in.
        times: how often it runs.
        is_fused: whether it is inside a fusion, where only results that leave it take memory.
        is_first: whether it is in the program's first computation.
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
                branches = _BRANCHES.search(one.rest)
                names = branches[1].split(",") if branches else ()
                pending += [(name.strip(" %"), times, fused) for name in names]
            elif "calls" in called:
                is_fusion = fused or one.operation == "fusion"
                pending.append((called["calls"], times, is_fusion))
            # Of a reduction this is its operator, which is no array's.
            elif one.operation == "call" and "to_apply" in called:
                pending.append((called["to_apply"], times, fused))
