"""Lists the largest arrays of a compiled program in the memory of one device."""

from typing import Any

from rwkv7_jax.plan import hlo

_COUNT = 10

# Operations whose results are arrays of other instructions, or parts of them.
_NO_ARRAY = {
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "optimization-barrier",
}


def largest_arrays(program: hlo.Program) -> list[dict[str, Any]]:
    """Lists the largest arguments and results, without results that reuse an operand's memory.

    Not all of them are live at the same time. Arrays of one shape share a row.

    Returns:
        Rows with `gib` (of one array), `shape`, `count` (distinct arrays) and `what` (origin of the
        first).
    """
    rows: dict[str, dict[str, Any]] = {}
    for visit in hlo.walk(program):
        one = visit.instruction
        # The parameters of a called computation are its caller's arrays.
        is_callers = one.operation == "parameter" and not visit.is_first
        # An asynchronous operation has its result in its "-done"; before, it also lists operands.
        is_unfinished = one.operation.endswith(("-start", "-update"))
        if (
            visit.is_fused
            or is_callers
            or is_unfinished
            or one.is_in_place
            or one.operation in _NO_ARRAY
        ):
            continue
        for shape, size in one.arrays():
            row = rows.setdefault(
                shape,
                {
                    "gib": size / 2**30,
                    "shape": shape,
                    "count": 0,
                    "what": _describe(one),
                },
            )
            row["count"] += 1
    largest = sorted(rows.values(), key=lambda row: -row["gib"])[:_COUNT]
    return [row | {"gib": round(row["gib"], 3)} for row in largest]


def _describe(one: hlo.Instruction) -> str:
    """Names the origin of an array: an argument, or an operation of the model."""
    if one.operation == "parameter":
        return f"argument {one.op_name}"
    # All names share a prefix: the step, its gradient, the model.
    return one.op_name.split(")/", 1)[-1][-90:] or one.operation
