"""How a run's time was spent, computed from its metrics and events."""

import pytest

from rwkv7_jax.reports.goodput import TimeSpent

EVENTS = [
    {"step": 0, "event": "start", "time": 100.0},
    {"step": 4, "event": "resume", "time": 160.0},
    {"step": 9, "event": "finished", "time": 200.0},
]
ROWS = [
    {"step": 2, "step_seconds": 20.0, "paused_seconds": 0.0, "compile_seconds": 10.0},
    {"step": 4, "step_seconds": 10.0, "paused_seconds": 5.0, "compile_seconds": 11.0},
    # Another process, whose clock of compiling begins again.
    {"step": 6, "step_seconds": 20.0, "paused_seconds": 0.0, "compile_seconds": 4.0},
    {"step": 6, "held_out/bits_per_byte": 2.0},
]


def goodput(rows, events):
    spent = TimeSpent()
    for row in rows:
        spent.add(row)
    return spent.goodput(events)


def test_the_parts_add_up_to_the_total_time():
    said = goodput(ROWS, EVENTS)
    assert said == (
        "50.0% steps, 15.0% compiling, 5.0% evaluating and saving, "
        "30.0% starts, restarts and repeated steps; 100 s since the first start, 1 restarts"
    )


@pytest.mark.parametrize(
    ("rows", "events"),
    [
        ([], EVENTS),
        (ROWS, []),
        # A run of an earlier version, whose events have no time.
        (ROWS, [{"step": 0, "event": "start"}, {"step": 9, "event": "finished"}]),
        # A process that is still at work, or was killed.
        (ROWS, EVENTS[:2]),
        (ROWS, [EVENTS[0] | {"time": 200.0}, EVENTS[2]]),
        ([{"step": 1, "step_seconds": "x"}], EVENTS),
        # The clock was set back by a minute.
        (ROWS, [*EVENTS[:2], EVENTS[2] | {"time": 140.0}]),
    ],
)
def test_goodput_is_empty_if_the_files_lack_times(rows, events):
    assert goodput(rows, events) == ""
