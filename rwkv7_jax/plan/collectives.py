"""Counts the collectives of a compiled program and the bytes that a device sends for them."""

import collections
import dataclasses
import math
import re
from typing import Any

from rwkv7_jax.plan import hlo

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

# On a TPU, a reduce-scatter may be a fusion with this name: an all-reduce and a slice of its
# result. A device sends no more than for the slice.
_FUSED_SCATTER = "all-reduce-scatter"

# A TPU program repeats a collective in each fusion that it overlaps with; the repetitions share a
# chain id. The channel id is no key: different collectives of a `shard_map` share it.
_CHAIN = re.compile(r'chain_id="(\d+)"')

# The three notations of replica groups.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_SIZE = re.compile(r"'(\w+)'=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind and group size in a step.

    Attributes:
        kind: one of `KINDS`.
        group: devices that take part in each.
        count: number of executions.
        bytes: bytes of their results on one device.
        wire_bytes: bytes that one device sends with the best known algorithm.
    """

    kind: str
    group: int
    count: int
    bytes: int
    wire_bytes: float

    def table_row(self) -> dict[str, Any]:
        """Returns a row of a table, in GB."""
        return {
            "kind": self.kind,
            "group": self.group,
            "count": self.count,
            "gb": round(self.bytes / 1e9, 4),
            "wire_gb": round(self.wire_bytes / 1e9, 4),
        }


def wire_bytes(kind: str, group: int, result: int) -> float:
    """Computes the bytes that one device sends for a collective.

    Args:
        kind: one of `KINDS`.
        group: devices that take part.
        result: bytes of the result on one device.
    """
    if group < 2:
        return 0.0
    if kind == "collective-permute":
        return float(result)
    share = (group - 1) / group
    if kind == "all-reduce":
        return 2 * share * result
    # Each device has `group` times the bytes of the result.
    if kind == "reduce-scatter":
        return share * group * result
    return share * result


def _group_size(rest: str, devices: int) -> int:
    """Returns the number of devices that take part; all devices if no group is named."""
    found = _LISTED.search(rest)
    if found:
        return found[1].count(",") + 1
    found = _COUNTED.search(rest)
    if found:
        return int(found[1])
    found = _NAMED.search(rest)
    if found:
        sizes = dict(_SIZE.findall(found[1]))
        names = re.findall(r"'(\w+)'", found[2])
        return math.prod(int(sizes[name]) for name in names)
    return devices


def _kind_of(operation: str) -> str | None:
    """Returns the kind of a collective, also from its "-start"; None for anything else."""
    kind = operation.removesuffix("-start")
    return kind if kind in KINDS else None


def _result_shape(one: hlo.Instruction) -> str:
    """Returns the shape of a collective's result."""
    # The "-start" of an asynchronous collective returns its operands, then its results.
    is_pair = one.operation.endswith("-start") and one.operation != "all-reduce-start"
    return _second(one.shape) if is_pair and one.shape.startswith("(") else one.shape


def _second(shape: str) -> str:
    """Returns the second element of a tuple's shape."""
    depth = 0
    start = 0
    elements = []
    for place, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (depth == 1 and letter == ",") or (depth == 0 and place == len(shape) - 1):
            elements.append(shape[start + 1 : place])
            start = place
    return elements[1] if len(elements) > 1 else shape


def find_collectives(program: hlo.Program, *, devices: int) -> list[Collective]:
    """Counts the collectives that one device takes part in during a step.

    Args:
        program: the compiled program.
        devices: number of devices of the program.
    """
    totals: dict[tuple[str, int], list[int]] = collections.defaultdict(lambda: [0, 0])
    seen = set()
    for visit in hlo.walk(program):
        one = visit.instruction
        kind = _kind_of(one.operation)
        if kind is None:
            continue
        group = _group_size(one.rest, devices)
        result = hlo.shape_bytes(_result_shape(one))
        if kind == "all-reduce" and visit.computation.startswith(_FUSED_SCATTER):
            kind = "reduce-scatter"
            result //= group
        chain = _CHAIN.search(one.rest)
        if chain:
            key = (chain[1], kind, result)
            if key in seen:
                continue
            seen.add(key)
        total = totals[kind, group]
        total[0] += visit.times
        total[1] += visit.times * result
    found = []
    for (kind, group), (count, size) in totals.items():
        found.append(
            Collective(
                kind=kind,
                group=group,
                count=count,
                bytes=size,
                wire_bytes=wire_bytes(kind, group, size),
            )
        )
    return sorted(found, key=lambda one: -one.wire_bytes)
