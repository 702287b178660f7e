"""Progress on a terminal, and as plain lines elsewhere."""

import io
import os
import termios

import pytest

from rwkv7_jax.runs.exit_codes import warn
from rwkv7_jax.runs.monitoring import progress_bar
from rwkv7_jax.runs.monitoring.progress_bar import (
    ProgressBar,
    byte_progress,
    count_progress,
    end_open_line,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    return now


def test_a_terminal_gets_one_redrawn_line(clock):
    terminal = Terminal()
    bar = ProgressBar(4, "train", file=terminal)
    for done in range(1, 5):
        clock[0] = float(done)
        bar.update(done, "loss 1")
    bar.close()
    drawn = terminal.getvalue()
    assert drawn.count("\r") == 4 and drawn.count("\n") == 1
    assert drawn.startswith(
        "\r[######..................] train  25%  0:03 left  loss 1"
    )


@pytest.mark.parametrize(
    ("columns", "text", "drawn"),
    [
        (60, "loss 1", f"[{'#' * 12}{'.' * 12}] train  50%  0:01 left  loss 1"),
        (40, "loss 1", "[####...] train  50%  0:01 left  loss 1"),
        (43, "loss 1", "[#####.....] train  50%  0:01 left  loss 1"),
        (20, "loss 1", "[##..] train  50%  "),
        # Some terminals do not know their width.
        (0, "x" * 99, f"[{'#' * 12}{'.' * 12}] train  50%  0:01 left  {'x' * 99}"),
    ],
)
def test_a_line_fits_into_the_width_of_the_terminal(clock, columns, text, drawn):
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, columns))
    with open(writer, "w", encoding="utf-8") as terminal:
        bar = ProgressBar(2, "train", file=terminal)
        clock[0] = 1.0
        bar.update(1, text)
        shown = os.read(reader, 4096).decode()
    os.close(reader)
    assert shown == f"\r{drawn}\x1b[K"


def test_the_line_ends_with_the_newest_numbers_and_the_next_begins_another(clock):
    terminal = Terminal()
    bar = ProgressBar(4, "train", file=terminal)
    for done in (1, 2):
        bar.update(done)
    bar.close()
    bar.close()
    bar.update(3)
    bar.close()
    first, second, rest = terminal.getvalue().split("\n")
    assert "train  50%" in first.rpartition("\r")[2]
    assert "train  75%" in second.rpartition("\r")[2]
    assert not rest


def test_a_file_gets_at_most_one_plain_line_per_tenth_and_few_seconds(clock):
    file = io.StringIO()
    bar = ProgressBar(100, "train", file=file)
    for done in range(1, 101):
        clock[0] = done / 8
        bar.update(done)
    bar.close()
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [
        "17%",
        "34%",
        "51%",
        "68%",
        "85%",
        "100%",
    ]
    assert "\r" not in file.getvalue() and "\x1b" not in file.getvalue()


def test_a_file_gets_a_line_a_minute_where_a_tenth_takes_longer(clock):
    file = io.StringIO()
    bar = ProgressBar(1000, "train", file=file)
    for done in range(1, 101):
        clock[0] = done * 2.5
        bar.update(done)
    shares = [line.split()[1] for line in file.getvalue().splitlines()]
    assert shares == ["2%", "5%", "8%", "10%"]


def test_the_newest_bar_has_moved_if_it_was_updated_lately(clock, monkeypatch):
    monkeypatch.setattr(progress_bar, "_newest", [])
    assert not progress_bar.a_bar_has_moved(10)
    bar = ProgressBar(1000, "train", file=io.StringIO())
    clock[0] = 20.0
    # Too early for a line in a file.
    bar.update(1)
    clock[0] = 29.0
    assert progress_bar.a_bar_has_moved(10)
    clock[0] = 30.0
    assert not progress_bar.a_bar_has_moved(10)


def test_a_total_of_zero_is_complete(clock):
    file = io.StringIO()
    ProgressBar(0, "read", file=file).update(1)
    assert file.getvalue() == "read 100%  0:00 left\n"


@pytest.mark.parametrize("error", [BrokenPipeError, OSError, ValueError])
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_closed_stream_does_not_end_the_work(stream, error, monkeypatch):
    lost = stream()

    def fail(text):
        raise error

    monkeypatch.setattr(lost, "write", fail)
    bar = ProgressBar(4, "read", file=lost)
    for done in range(1, 5):
        bar.update(done)
    bar.close()


def test_an_error_during_byte_progress_gets_its_own_line(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(progress_bar.sys, "stdout", terminal)
    with pytest.raises(ValueError), byte_progress("reading") as progress:
        progress(1_000_000, 4_000_000)
        raise ValueError
    assert "reading  25%" in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")


def test_another_total_begins_another_bar(capsys):
    with count_progress("base", "requests") as report:
        for total in (3, 2):
            for done in range(1, total + 1):
                report(done, total)
    assert capsys.readouterr().out.splitlines() == [
        "base 100%  0:00 left  3 of 3 requests",
        "base 100%  0:00 left  2 of 2 requests",
    ]


def test_the_time_left_counts_from_the_beginning_of_the_work(clock, capsys):
    with count_progress("teacher", "prompts") as report:
        clock[0] = 100.0
        report(1, 2)
    assert capsys.readouterr().out == "teacher  50%  1:40 left  1 of 2 prompts\n"


@pytest.mark.parametrize("speak", [lambda: warn("low"), end_open_line])
def test_other_text_does_not_continue_the_line_of_a_bar(speak):
    terminal = Terminal()
    bar = ProgressBar(4, "train", file=terminal)
    bar.update(1)
    speak()
    assert terminal.getvalue().endswith("\n")
    bar.update(2)
    assert not terminal.getvalue().endswith("\n")
    bar.close()
