"""The goodput of a run: the fraction of its wall time spent on steps that were kept.

The wall time runs from the first start to the last event and includes the time between two
processes. Steps that a killed process made and the next one repeated appear in no row, so their
time counts as lost.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rwkv7_jax.json_files import number_of

# Columns of the metrics: seconds since the previous line.
STEPS = "step_seconds"
PAUSES = "paused_seconds"

# Cumulative seconds of a process. A value below the previous one comes from a new process.
COMPILING = "compile_seconds"


# By what share of the wall time its parts may exceed it, because times are rounded.
_TOLERANCE = 0.01


class TimeSpent:
    """The time that the processes of a run spent on steps, pauses and compiling."""

    def __init__(self):
        """Starts without any time."""
        self._has_steps = False
        self._steps = 0.0
        self._pauses = 0.0
        self._compiling = 0.0
        self._compiled_before = 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds the time of a row of the metrics; rows are in chronological order."""
        steps = number_of(row.get(STEPS))
        self._has_steps |= steps is not None
        self._steps += steps or 0.0
        self._pauses += number_of(row.get(PAUSES)) or 0.0
        compiled = number_of(row.get(COMPILING))
        if compiled is not None:
            # The counter restarts at 0 in each process.
            is_same_process = compiled >= self._compiled_before
            self._compiling += compiled - (
                self._compiled_before if is_same_process else 0.0
            )
            self._compiled_before = compiled

    def goodput(self, events: Sequence[Mapping[str, Any]]) -> str:
        """Describes how the time was spent; "" if the files of the run do not have it.

        Args:
            events: events in chronological order; `time` is in seconds.
        """
        times = [number_of(event.get("time")) for event in events]
        known = [time for time in times if time is not None]
        # If the last event is a start, the end of that process is unknown.
        is_over = bool(events) and events[-1].get("event") not in ("start", "resume")
        if not (self._has_steps and is_over and len(known) == len(events) > 1):
            return ""
        wall = known[-1] - known[0]
        if wall <= 0:
            return ""
        spent = {
            "steps": self._steps,
            "compiling": self._compiling,
            "evaluating and saving": self._pauses,
        }
        rest = wall - sum(spent.values())
        if rest < -_TOLERANCE * wall:
            # The clock was set back, or the events are of another run.
            return ""
        rest = max(rest, 0.0)
        spent["starts, restarts and repeated steps"] = rest
        parts = [f"{seconds / wall:.1%} {name}" for name, seconds in spent.items()]
        restarts = sum(event.get("event") == "resume" for event in events)
        return (
            f"{', '.join(parts)}; {wall:,.0f} s since the first start, "
            f"{restarts} restarts"
        )
