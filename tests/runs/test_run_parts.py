"""The parts of a run: its lock, signals, batches made ahead, what it remembers."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from rwkv7_jax.data.prefetch import Prefetch
from rwkv7_jax.data.token_streams import as_stream
from rwkv7_jax.reports.metric_writers import json_lines
from rwkv7_jax.runs import compilation_cache as compile_cache
from rwkv7_jax.runs import run_lock
from rwkv7_jax.runs.datasets import digest_of
from rwkv7_jax.runs.early_stopping import RunProgress
from rwkv7_jax.runs.exit_codes import (
    DiskError,
    NotFinite,
    NoValidCheckpoint,
    Stopped,
    exit_with_code,
)
from rwkv7_jax.runs.resume import step_directories as step_folders
from rwkv7_jax.runs.run_directory import RunFolder
from rwkv7_jax.runs.run_lock import RunLock
from rwkv7_jax.runs.settings import Evaluation, Optimizer, Settings
from rwkv7_jax.runs.signals import StopSignals


@pytest.fixture(autouse=True)
def _hook(monkeypatch):
    """A program may change what Python does with errors that nobody can take; a test may not."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)


HERE = socket.gethostname()


def test_f9_a_second_holder_is_refused_with_pid_and_host(tmp_path):
    lock = RunLock(tmp_path / "run.lock")
    with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on {HERE};"):
        RunLock(tmp_path / "run.lock")
    lock.release()
    again = RunLock(tmp_path / "run.lock")
    assert again.stale == ""
    again.release()


def test_f9_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path):
    code = "import os, pathlib, sys; from rwkv7_jax.runs.run_lock import RunLock; "
    code += "RunLock(pathlib.Path(sys.argv[1])); print(os.getpid(), flush=True); os._exit(1)"
    words = [sys.executable, "-c", code, str(tmp_path / "run.lock")]
    pid = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    lock = RunLock(tmp_path / "run.lock")
    assert lock.stale == f"process {pid} on {HERE}"
    lock.release()


@pytest.mark.parametrize("lives", [True, False])
def test_f9_a_holder_on_another_machine_is_watched_for_a_while(tmp_path, monkeypatch, lives):
    monkeypatch.setattr(run_lock, "BEAT", 0.02)
    path = tmp_path / "run.lock"
    path.write_text('{"pid": 7, "host": "far.away"}\n')
    done = threading.Event()

    def beat():
        while lives and not done.wait(0.005):
            os.utime(path)

    other = threading.Thread(target=beat)
    other.start()
    try:
        if lives:
            with pytest.raises(ValueError, match=r"in use by process 7 on far\.away"):
                RunLock(path)
        else:
            lock = RunLock(path)
            assert lock.stale == "process 7 on far.away"
            lock.release()
    finally:
        done.set()
        other.join()


def test_a_signal_is_a_request_and_ends_what_may_be_interrupted():
    with StopSignals() as stop:
        assert not stop.seen()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.seen() and stop.requested == "SIGTERM"
        with pytest.raises(Stopped, match="stopped by SIGTERM"), stop.interruptible():
            raise AssertionError("a request that is there already ends the block before it begins")
    with StopSignals() as stop, pytest.raises(Stopped), stop.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no"), 2),
        (FileNotFoundError(2, "no", "x"), 2),
        (NoValidCheckpoint("no"), 3),
        (NotFinite("no"), 4),
        (DiskError("no"), 5),
        (OSError(28, "No space left on device"), 5),
        (Stopped("no"), 0),
    ],
)
def test_each_end_has_its_code_and_says_why_on_the_last_line(error, code, capfd):
    with pytest.raises(SystemExit) as caught, exit_with_code("train.py"):
        raise error
    assert caught.value.code == code
    assert capfd.readouterr().err == f"train.py: {error}\n"


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError), exit_with_code("train.py"):
        raise KeyError("x")


def test_batches_made_ahead_keep_their_order_and_their_error():
    def numbers():
        yield from range(50)
        raise ValueError("at 50")

    ahead = Prefetch(numbers())
    assert [next(ahead) for _ in range(50)] == list(range(50))
    for _ in range(2):
        with pytest.raises(ValueError, match="at 50"):
            next(ahead)
    ahead.close()


def test_no_more_is_made_ahead_than_was_asked_for_and_closing_ends_it():
    made = []
    ahead = Prefetch((made.append(n) or n for n in itertools.count()), ahead=3)
    assert next(ahead) == 0
    time.sleep(0.1)
    assert len(made) <= 5
    ahead.close()
    assert not ahead._thread.is_alive()


def measured(values, name="held_out_bits_per_byte", kept=1, **choices):
    evaluation, course = Evaluation(**choices), RunProgress()
    for step, value in enumerate(values):
        course = course.after(10 * step, {name: value, "other": 0.0}, evaluation, kept=kept)
    return course, evaluation


def test_less_is_better_for_bits_and_more_for_accuracies():
    course, _ = measured([3.0, 1.0, 2.0, 1.0], kept=2)
    assert course.best == ((1.0, 10), (1.0, 30)) and course.waited == 2
    course, _ = measured([0.1, 0.9, 0.5], name="copy_accuracy", kept=2)
    assert course.best_steps(1) == (10,)


def test_a_run_ends_after_evaluations_without_a_better_one():
    for count, ends in ((3, False), (4, True)):
        course, evaluation = measured([1.0, 2.0, 2.0, float("nan")][:count], patience=3)
        assert bool(course.ended_early(evaluation)) == ends


def test_a_run_ends_when_its_measure_is_enough():
    for values, ends in (([0.2, 0.8], False), ([0.2, 0.98], True)):
        course, evaluation = measured(values, name="held_out_reward", enough=0.97)
        assert bool(course.ended_early(evaluation)) == ends


def test_a_measure_that_is_not_taken_is_refused_by_name():
    with pytest.raises(ValueError, match=r"must be one of held_out_bits_per_byte, other; got"):
        measured([1.0], measure="accuracy")


def test_steps_are_sealed_with_all_their_files(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "in/b"):
        (tmp_path / name).write_text(name)
    step_folders.write_manifest(tmp_path)
    assert step_folders.verify_manifest(tmp_path) == []
    (tmp_path / "in/b").write_text("c")
    (tmp_path / "further").write_text("")
    assert step_folders.verify_manifest(tmp_path) == ["in/b", "further"]


def test_f26_without_a_home_or_a_folder_for_programs_a_warning_is_all(monkeypatch, capfd, tmp_path):
    changed = []
    monkeypatch.setattr(compile_cache.jax.config, "update", lambda *pair: changed.append(pair))
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert compile_cache.enable_compilation_cache(compile_cache.user_folder()) is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compile_cache.enable_compilation_cache(compile_cache.user_folder()) is None
    assert changed == [("jax_enable_compilation_cache", False)] * 2
    assert capfd.readouterr().err.count("warning: programs are compiled anew each time") == 2


def test_metrics_behind_the_restored_step_are_cut_and_broken_lines_forgiven(tmp_path):
    with RunFolder(tmp_path, Settings()) as folder:
        for step in (1, 2, 3):
            folder.log(step, {"loss_nats": 0.5 * step, "learning_rate": 0.1})
        folder.log_bad(3, {"loss": float("nan")}, np.ones((1, 2), int))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with RunFolder(tmp_path, Settings()) as folder:
        assert [row["step"] for row in folder.rows()] == [1, 2, 3]
        folder.restored(2)
        assert [row["step"] for row in folder.rows()] == [1, 2]
        assert json_lines(tmp_path / "bad_batches.jsonl") == []
        assert [row["event"] for row in json_lines(tmp_path / "events.jsonl")] == [
            "skipped",
            "resume",
        ]
    assert "resume" in (tmp_path / "report.html").read_text()


def test_f17_a_folder_of_other_settings_is_refused_by_the_setting(tmp_path):
    with RunFolder(tmp_path, Settings()):
        (tmp_path / "checkpoints" / "5").mkdir()
    other = Settings(optimizer=Optimizer(learning_rate=0.5), log_every=3)
    with pytest.raises(ValueError, match=r"`optimizer\.learning_rate` is 0\.0006; got 0\.5"):
        RunFolder(tmp_path, other)
    with RunFolder(tmp_path, Settings(log_every=3)):
        pass


def test_f8_a_folder_that_cannot_be_is_an_error_of_the_disk(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"`--workdir` .*/run cannot be written"):
        RunFolder(tmp_path / "file" / "run", Settings())


def test_the_datas_digest_sees_each_id_and_the_files_bytes(tmp_path):
    ids = np.arange(5000, dtype=np.uint16)
    other = ids.copy()
    other[4321] += 1
    one, two = as_stream(ids), as_stream(other)
    assert digest_of("a", one) == digest_of("b", one) != digest_of("a", two)
    digests = []
    for text in ("one", "two"):
        (tmp_path / "q.jsonl").write_text(text)
        digests.append(digest_of(str(tmp_path / "q.jsonl"), None))
    assert digests[0] != digests[1]
