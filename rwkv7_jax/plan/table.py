"""Formats a plan as text."""

from collections.abc import Mapping
from typing import Any


def describe(plan: Mapping[str, Any]) -> str:
    """Formats a plan."""
    verdict = "fits" if plan["fits"] else "does not fit"
    lines = [
        f"chips       {plan['chips']} ({plan['topology']}: {plan['device_kind']}), "
        f"{plan['hosts']} host(s), {plan['devices']} device(s)",
        f"mesh        {_mesh(plan)}",
        f"step        {plan['mode']}, {plan['batch']} rows of {plan['length']} tokens",
        f"memory      {verdict}: peak {plan['peak_gib']:.2f} of {plan['limit_gib']:.2f} GiB on "
        f"each device; arguments {plan['argument_gib']:.2f}{_temporary(plan)}",
    ]
    if plan["estimated_gib"] is not None:
        lines.append(f"estimated   {plan['estimated_gib']:.2f} GiB by train.py")
    if "reason" in plan:
        lines.append(f"compiler    {plan['reason']}")
    lines += _buffers(plan["buffers"])
    lines += _collectives(plan)
    for one in plan.get("search", ()):
        lines.append(f"search      {describe_entry(one)}")
    versions = ", ".join(f"{name} {text}" for name, text in plan["versions"].items())
    lines.append(f"compiled    in {plan['compile_seconds']:.0f} s by {versions}")
    return "\n".join(lines)


def describe_entry(entry: Mapping[str, Any]) -> str:
    """Formats an entry of a search."""
    rows = f"{entry['batch']} rows"
    if "error" in entry:
        return f"{rows}: {entry['error']}"
    word = "fits" if entry["fits"] else "does not fit"
    return f"{rows}: {entry['peak_gib']:.2f} GiB, {word}"


def _mesh(plan: Mapping[str, Any]) -> str:
    sizes = [f"{axis} {size}" for axis, size in plan["mesh"].items()]
    return ", ".join(sizes) or "one device"


def _temporary(plan: Mapping[str, Any]) -> str:
    size = plan["temporary_gib"]
    return "" if size is None else f", temporaries {size:.2f}"


def _buffers(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["arrays      the largest; not all are live at the same time"]
    for row in rows:
        count = f"x{row['count']}"
        lines.append(
            f"  {row['gib']:8.3f} GiB {count:>5}  {row['shape']}  {row['what']}"
        )
    return lines


def _collectives(plan: Mapping[str, Any]) -> list[str]:
    rows = plan["collectives"]
    if not rows:
        return [] if plan["wire_gb"] is None else ["wire        no collectives"]
    line = f"wire        {plan['wire_gb']:.2f} GB per step sent by each device"
    if plan["expected_wire_gb"] is not None:
        line += f"; {plan['expected_wire_gb']:.2f} by the layout alone"
    lines = [line]
    for row in rows:
        lines.append(
            f"  {row['kind']:<19} of {row['group']:>4}  {row['count']:>6} times  "
            f"{row['gb']:9.3f} GB  {row['wire_gb']:9.3f} GB on the wire"
        )
    return lines
