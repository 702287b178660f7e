"""The goodput of a run: the share of its time that made steps which count.

The time runs from the first start to the last event, with everything between two processes. Steps
that a killed process made and the next one repeated are in no row, so that their time is lost.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rwkv7_jax.json_files import number_of

# Columns of the metrics: seconds since the line before.
STEPS = "step_seconds"
PAUSES = "paused_seconds"

# Seconds since the process began; a smaller number than the one before is another process's.
COMPILING = "compile_seconds"


def goodput(
    rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> str:
    """Describes how the time of a run was spent; "" where its files do not tell.

    Args:
        rows: metrics by step.
        events: in the order in which they happened, with the seconds of a clock as `time`.
    """
    times = _numbers(events, "time")
    steps = _numbers(rows, STEPS)
    # The last event may be a start: how long that process has worked since, nothing tells.
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
    """Adds up a number that grows, and begins at 0 again in each process."""
    total = 0.0
    before = 0.0
    for value in values:
        total += value - before if value >= before else value
        before = value
    return total
