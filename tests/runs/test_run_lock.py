"""The lock of a run directory: one process at a time, on one machine or several."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from rwkv7_jax.runs import run_lock
from rwkv7_jax.runs.exit_codes import InUse
from rwkv7_jax.runs.run_lock import RunLock

HERE = socket.gethostname()


def test_a_second_holder_is_rejected_with_pid_and_host(tmp_path):
    lock = RunLock(tmp_path / "run.lock")
    with pytest.raises(
        ValueError, match=f"is in use by process {os.getpid()} on {HERE};"
    ):
        RunLock(tmp_path / "run.lock")
    lock.release()
    again = RunLock(tmp_path / "run.lock")
    assert again.stale == ""
    again.release()


DIE_WITH_THE_LOCK = """
import os, pathlib, sys
from rwkv7_jax.runs.run_lock import RunLock
RunLock(pathlib.Path(sys.argv[1]))
print(os.getpid(), flush=True)
os._exit(1)
"""


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    words = [sys.executable, "-c", DIE_WITH_THE_LOCK, str(tmp_path / "run.lock")]
    pid = subprocess.run(
        words, capture_output=True, text=True, check=False
    ).stdout.strip()
    lock = RunLock(tmp_path / "run.lock")
    assert lock.stale == f"process {pid} on {HERE}"
    lock.release()


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_machine_is_watched_for_a_while(
    tmp_path, monkeypatch, alive
):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.02)
    path = tmp_path / "run.lock"
    path.write_text('{"pid": 7, "host": "far.away"}\n')
    done = threading.Event()

    def heartbeat():
        while alive and not done.wait(0.005):
            os.utime(path)

    other = threading.Thread(target=heartbeat)
    other.start()
    try:
        if alive:
            with pytest.raises(ValueError, match=r"in use by process 7 on far\.away"):
                RunLock(path)
        else:
            lock = RunLock(path)
            assert lock.stale == "process 7 on far.away"
            lock.release()
    finally:
        done.set()
        other.join()


def test_a_displaced_holder_notices_and_keeps_the_lock_of_the_new_one(tmp_path):
    path = tmp_path / "run.lock"
    lock = RunLock(path)
    lock.require()
    # Another machine, on a file system without locks, took this process for dead.
    other = '{"pid": 7, "host": "far.away", "token": "a"}\n'
    path.write_text(other)
    with pytest.raises(
        InUse, match=r"was taken over by process 7 on far\.away: it was"
    ):
        lock.require()
    lock.release()
    assert path.read_text() == other
