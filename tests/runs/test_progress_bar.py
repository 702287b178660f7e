"""Progress on a terminal, and as plain lines elsewhere."""

import io

import pytest

from rwkv7_jax.runs.monitoring import progress_bar
from rwkv7_jax.runs.monitoring.progress_bar import ProgressBar, byte_progress


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
