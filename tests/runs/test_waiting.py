"""A process that waits for long says for what; one that does not wait says nothing."""

import io
import socket
import time

import pytest
from run_programs import SMALLEST, start

from rwkv7_jax.runs import waiting
from rwkv7_jax.runs.monitoring.progress_bar import ProgressBar
from rwkv7_jax.runs.waiting import report_first_call, report_wait


class Terminal(io.StringIO):
    def isatty(self):
        return True


def messages(capsys, count):
    """Waits for some messages on stderr and returns them."""
    text = ""
    end = time.monotonic() + 30
    while text.count("\n") < count and time.monotonic() < end:
        time.sleep(0.01)
        text += capsys.readouterr().err
    return text.splitlines()


def test_a_long_wait_is_reported_again_and_again_and_a_short_one_is_not(
    monkeypatch, capsys
):
    monkeypatch.setattr(waiting, "SECONDS", 0.02)
    with report_wait("process 0"):
        lines = messages(capsys, 3)
    assert len(lines) >= 3
    assert all(line.startswith("waiting for process 0 (") for line in lines)
    capsys.readouterr()
    with report_wait("process 0"):
        pass
    assert capsys.readouterr().err == ""


def test_the_pauses_between_messages_grow_to_a_minute(monkeypatch, capsys):
    pauses = []

    class Event:
        def wait(self, seconds):
            pauses.append(seconds)
            return len(pauses) == 6

        def set(self):
            pass

    # Another test may have moved a bar in the last seconds.
    monkeypatch.setattr(waiting, "a_bar_has_moved", lambda seconds: False)
    monkeypatch.setattr(waiting.threading, "Event", Event)
    # Threads have events of their own.
    monkeypatch.setattr(waiting.threading, "Thread", Inline)
    with report_wait("process 0"):
        pass
    assert pauses == [15, 30, 60, 60, 60, 60]
    assert capsys.readouterr().err.count("waiting for process 0") == 5


class Inline:
    """A thread that runs when it is started."""

    def __init__(self, target, daemon):
        self.start = target

    def join(self):
        pass


def test_the_innermost_wait_is_named_and_the_outer_one_after_it(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "SECONDS", 0.02)
    monkeypatch.setattr(waiting, "_MOST_SECONDS", 0.02)
    with report_wait("the run"):
        with report_wait("its weights"):
            assert messages(capsys, 2)[-1].startswith("waiting for its weights (")
        capsys.readouterr()
        lines = messages(capsys, 2)
    assert lines[-1].startswith("waiting for the run (")
    assert waiting._waits == []


def test_many_short_waits_in_a_long_one_are_not_silent(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "SECONDS", 0.05)
    text = ""
    end = time.monotonic() + 30
    with report_wait("the run"):
        while not text and time.monotonic() < end:
            with report_wait("one text"):
                time.sleep(0.01)
            text = capsys.readouterr().err
    assert text.startswith("waiting for ")


def test_nothing_is_said_while_a_bar_moves(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "SECONDS", 0.02)
    monkeypatch.setattr(waiting, "_MOST_SECONDS", 0.02)
    monkeypatch.setattr(waiting, "a_bar_has_moved", lambda seconds: True)
    with report_wait("the answers"):
        time.sleep(0.2)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(waiting, "a_bar_has_moved", lambda seconds: False)
        assert messages(capsys, 1)


def test_a_bar_on_a_terminal_ends_its_line_before_a_message(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "SECONDS", 0.02)
    terminal = Terminal()
    bar = ProgressBar(4, "train", file=terminal)
    bar.update(1)
    assert not terminal.getvalue().endswith("\n")
    time.sleep(0.05)
    with report_wait("an evaluation"):
        messages(capsys, 1)
    assert terminal.getvalue().endswith("\n")


def test_controls_in_a_name_are_escaped(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "SECONDS", 0.02)
    with report_wait("the weights of a\x1b[2J"):
        (line, *_) = messages(capsys, 1)
    assert "of a\\x1b[2J (" in line


@pytest.mark.parametrize("error", [BrokenPipeError, OSError, ValueError])
def test_a_closed_stderr_does_not_end_the_messages(error, monkeypatch):
    asked = []

    class Lost(io.StringIO):
        def write(self, text):
            asked.append(text)
            raise error

    monkeypatch.setattr(waiting, "SECONDS", 0.02)
    monkeypatch.setattr(waiting.sys, "stderr", Lost())
    end = time.monotonic() + 30
    with report_wait("process 0"):
        while len(asked) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    assert len(asked) >= 2


def test_a_wait_that_fails_ends_its_messages(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "SECONDS", 0.05)
    with pytest.raises(OSError, match="away"), report_wait("process 0"):
        raise OSError("away")
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_the_first_call_of_a_wrapped_function_is_reported_and_no_other(
    monkeypatch, capsys
):
    monkeypatch.setattr(waiting, "SECONDS", 0.05)

    def slow(number, *, times):
        time.sleep(0.3)
        return number * times

    call = report_first_call(slow, "the compilation")
    assert call(2, times=3) == 6
    assert "waiting for the compilation (" in capsys.readouterr().err
    assert call(3, times=4) == 12
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_process_says_that_it_waits_for_one_that_does_not_come(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    words = [f"--coordinator={place}", "--processes=2", "--process=0"]
    process = start(tmp_path, extra=words, **SMALLEST)
    try:
        line = process.stderr.readline()
    finally:
        process.kill()
        process.communicate()
    assert (
        line
        == f"waiting for all 2 processes to meet at {place}, 300 s at most (15 s)\n"
    )
