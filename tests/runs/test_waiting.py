"""A process that waits for long says for what; one that does not wait says nothing."""

import socket
import time

import pytest
from run_programs import SMALLEST, start

from rwkv7_jax.runs import waiting
from rwkv7_jax.runs.waiting import report_first_call, report_wait


def test_a_long_wait_is_reported_again_and_again_and_a_short_one_is_not(
    monkeypatch, capsys
):
    monkeypatch.setattr(waiting, "SECONDS", 0.05)
    with report_wait("process 0"):
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2
    assert all(line.startswith("waiting for process 0 (") for line in lines)
    with report_wait("process 0"):
        pass
    assert capsys.readouterr().err == ""


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
