"""The largest arrays of a compiled program in the memory of one device."""

from typing import Any

from rwkv7_jax.plan import hlo

_COUNT = 10

# Their results are other instructions' arrays, or parts of them.
_NO_ARRAY = {
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    # The first half of a copy names its source; the second half is the copy.
    "copy-start",
    "optimization-barrier",
}


def largest_arrays(program: hlo.Program) -> list[dict[str, Any]]:
    """Lists the largest arguments and results, those that lie where an operand lay left out.

    Not all of them exist at the same time. Arrays of one shape are one row.

    Returns:
        Rows of `gib` of one of them, `shape`, `count` of different ones, and `what` the first is.
    """
    rows: dict[str, dict[str, Any]] = {}
    for visit in hlo.walk(program):
        one = visit.instruction
        # The parameters of a loop are its caller's arrays.
        is_callers = one.operation == "parameter" and not visit.is_first
        if (
            visit.is_fused
            or is_callers
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
    """Says where an array comes from: an argument's name, or the model's operation."""
    if one.operation == "parameter":
        return f"argument {one.op_name}"
    # The beginning is the same of all: the step, its gradient, the model.
    return one.op_name.split(")/", 1)[-1][-90:] or one.operation
