"""The goodput of a run: the fraction of its wall time spent on steps that were kept.

The wall time runs from the first start to the last event and includes the time between two
processes. Steps that a killed process made and the next one repeated appear in no row, so their
time counts as lost.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rwkv7_jax.json_files import number_of

# Columns of the metrics: seconds since the previous line.
STEPS = "step_seconds"
PAUSES = "paused_seconds"

# Cumulative seconds of a process. A value below the previous one comes from a new process.
COMPILING = "compile_seconds"


def goodput(
    rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> str:
    """Describes how the time of a run was spent; "" if its files do not have that information.

    Args:
        rows: metrics by step.
        events: events in chronological order; `time` is in seconds.
    """
    times = _numbers(events, "time")
    steps = _numbers(rows, STEPS)
    # If the last event is a start, the end of that process is unknown.
    is_over = bool(events) and events[-1].get("event") not in ("start", "resume")
    if not (steps and is_over and len(times) == len(events) > 1):
        return ""
    wall = times[-1] - times[0]
    if wall <= 0:
        return ""
    spent = {
        "steps": sum(steps),
        "compiling": _sum_of_rises(_numbers(rows, COMPILING)),
        "evaluating and saving": sum(_numbers(rows, PAUSES)),
    }
    rest = max(wall - sum(spent.values()), 0.0)
    spent["starts, restarts and repeated steps"] = rest
    parts = [f"{seconds / wall:.1%} {name}" for name, seconds in spent.items()]
    restarts = sum(event.get("event") == "resume" for event in events)
    return (
        f"{', '.join(parts)}; {wall:,.0f} s since the first start, {restarts} restarts"
    )


def _numbers(rows: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    values = [number_of(row.get(name)) for row in rows]
    return [value for value in values if value is not None]


def _sum_of_rises(values: Iterable[float]) -> float:
    """Adds up the increases of a counter that restarts at 0 in each process."""
    total = 0.0
    before = 0.0
    for value in values:
        total += value - before if value >= before else value
        before = value
    return total
