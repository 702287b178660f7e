"""train.py as a program under faults: kills, signals, a full disk, non-finite losses."""

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from run_programs import SMALLEST, ends_within, finish, last_line, start

from rwkv7_jax.data.tasks.synthetic_tasks import task_batch
from rwkv7_jax.runs.resume.step_directories import BAD, SAVING, step_numbers

pytestmark = pytest.mark.slow
# A few random moments by default; RWKV7_FAULT_SEEDS=20 takes more of them.
SEEDS = range(int(os.environ.get("RWKV7_FAULT_SEEDS", "2")))
STEPS = 24
CHILD = ("tests/support/faulty_train.py",)


def run(workdir: Path, *, fault: str = "", environment=(), extra=(), **settings):
    """Starts the smallest run."""
    child = CHILD if fault else ()
    os.environ["FAULT"] = fault
    return start(
        workdir,
        child=child,
        environment=environment,
        extra=extra,
        **(SMALLEST | settings),
    )


def rows(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    path = workdir / name
    return (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def wait_for(condition, process, seconds: float = 300.0) -> None:
    """Waits until the condition holds or the program has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.002)


def training(workdir: Path, process, step: int = 3) -> None:
    """Waits until the run has completed some steps."""
    wait_for(
        lambda: (workdir / "metrics.csv").exists() and _last(workdir) >= step, process
    )


def _last(workdir: Path) -> int:
    lines = (workdir / "metrics.csv").read_text().splitlines()[1:]
    return int(lines[-1].split(",")[0] or 0) if lines else 0


def record(workdir: Path, step: int) -> dict:
    """Reads the record of a step's checkpoint."""
    return json.loads(
        (workdir / "checkpoints" / str(step) / "record" / "metadata").read_text()
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Returns the last record of a run without faults."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(run(folder, steps=STEPS, save_every=2))
    return record(folder, STEPS)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_killed_at_a_random_moment_resumes_bit_exactly(tmp_path, unbroken, seed):
    draw = random.Random(seed)
    kills = 0
    while True:
        process = run(tmp_path, steps=STEPS, save_every=2)
        if kills < 2:
            before = max(step_numbers(tmp_path / "checkpoints"), default=0)
            saving = tmp_path / "checkpoints" / SAVING
            if (seed + kills) % 2:
                training(tmp_path, process, before + 1)
                wait_for(lambda s=saving: s.exists() and any(s.iterdir()), process)
                time.sleep(draw.random() * 0.15)
            else:
                training(tmp_path, process, before + 1)
                time.sleep(draw.random() * 2)
            process.kill()
        _, error = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
        kills += 1
    assert kills, "the run was over before it could be killed"
    assert not (tmp_path / "checkpoints" / BAD).exists()
    found = record(tmp_path, STEPS)
    assert (
        found["leaves"] == unbroken["leaves"] and found["course"] == unbroken["course"]
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_the_last_finished_step_within_five_seconds(tmp_path, name):
    process = run(tmp_path, steps=1_000_000)
    training(tmp_path, process)
    if name == "SIGTERM":  # In the meantime no other process may use the folder.
        second = run(tmp_path, steps=1_000_000)
        reason = last_line(finish(second, 75)[1])
        assert f"is in use by process {process.pid} on " in reason
    with ends_within(5, process):
        process.send_signal(getattr(signal, name))
        _, error = finish(process, 0)
    step = rows(tmp_path)[-1]["step"]
    assert step_numbers(tmp_path / "checkpoints") == [step]
    assert last_line(error).startswith(
        f"train.py: stopped by {name}; step {step} is saved."
    )


def test_a_supervisor_can_distinguish_a_stopped_run_from_a_finished_one(tmp_path):
    flag = ("--stopped_code=75",)
    process = run(tmp_path, steps=1_000_000, extra=flag)
    training(tmp_path, process)
    process.terminate()
    _, error = finish(process, 75)
    assert last_line(error).startswith("train.py: stopped by SIGTERM; step ")
    (step,) = step_numbers(tmp_path / "checkpoints")
    # Restarted by the same command line but for the steps, it goes on and is done.
    out, _ = finish(run(tmp_path, steps=step + 1, extra=flag), 0)
    assert f"resume    from step {step}" in out


@pytest.mark.parametrize("seconds", [0, 2])
def test_a_signal_also_ends_a_run_with_nothing_to_save(tmp_path, seconds):
    # Two seconds later the first evaluation is being compiled; the cache of programs must be empty.
    large = {"model.num_layers": 3, "model.width": 64, "sample.prompts": "('one',)"}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    process = run(tmp_path, steps=5, environment=cache, **large)
    mark = "system.json" if seconds else "checkpoints"
    wait_for(lambda: (tmp_path / mark).exists(), process)
    time.sleep(seconds)
    with ends_within(5, process):
        process.send_signal(signal.SIGTERM)
        _, error = finish(process, 0)
    assert "stopped by SIGTERM" in last_line(error)
    assert step_numbers(tmp_path / "checkpoints") == []


def test_a_second_interrupt_exits_at_once_and_the_older_checkpoint_is_valid(tmp_path):
    process = run(tmp_path, fault="slow:60", steps=1_000_000, save_every=5)
    wait_for(lambda: 5 in step_numbers(tmp_path / "checkpoints"), process)
    training(tmp_path, process, 10)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    # Writing takes a minute.
    with ends_within(2, process):
        process.send_signal(signal.SIGINT)
        _, error = finish(process, 130)
    assert "exited at once" in last_line(error)
    out, _ = finish(run(tmp_path, steps=6))
    assert "resume    from step 5" in out


def test_a_full_disk_prevents_checkpoints_but_not_the_run(tmp_path):
    finish(run(tmp_path, steps=4))
    before = record(tmp_path, 4)
    _, error = finish(run(tmp_path, fault="size:12000", steps=12, save_every=4), 5)
    assert error.count("training continues") == 2
    reason = last_line(error)
    assert reason.startswith(
        "train.py: the checkpoint of step 12 could not be written: it needs "
    )
    assert "the newest checkpoint is of step 4" in reason
    assert not (tmp_path / "checkpoints" / SAVING).exists()
    assert (
        step_numbers(tmp_path / "checkpoints") == [4] and record(tmp_path, 4) == before
    )
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(
        range(1, 13)
    )
    out, _ = finish(run(tmp_path, steps=12, save_every=4))
    assert "resume    from step 4" in out and 12 in step_numbers(
        tmp_path / "checkpoints"
    )


@pytest.mark.parametrize(("workdir", "code"), [("file/run", 5), ("", 2)])
def test_an_impossible_workdir_ends_the_run_before_anything_compiles(
    tmp_path, workdir, code, monkeypatch
):
    (tmp_path / "file").write_text("")
    programs = tmp_path / "programs"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    place = tmp_path / workdir if workdir else ""
    _, error = finish(run(place, steps=1), code)
    assert len(error.strip().splitlines()) == 1 and "`--workdir`" in error
    assert not list(programs.glob("*"))


def test_non_finite_updates_are_skipped_bit_exactly_and_logged(tmp_path):
    choices = {"save_every": 1, "keep": 9, "steps": 6}
    out, _ = finish(run(tmp_path, fault="nan:3,4", **choices))
    assert "2 updates were skipped" in out
    leaves = {step: record(tmp_path, step)["leaves"] for step in range(1, 7)}
    counters = ("step", "skipped")
    moved = [
        sum(leaves[step][name] != leaf for name, leaf in leaves[step - 1].items()
            if name not in counters)
        for step in range(2, 7)
    ]  # fmt: skip
    assert moved[1:3] == [0, 0] and all(moved[i] > 20 for i in (0, 3, 4))
    bad = rows(tmp_path, "bad_batches.jsonl")
    assert [row["step"] for row in bad] == [3, 4] and bad[0]["loss"] == "nan"
    batch = task_batch("mapping", 2, batch_size=2, length=24, seed=0)
    assert np.array_equal(bad[0]["tokens"], batch["tokens"])
    assert [row["updated"] for row in rows(tmp_path) if "updated" in row] == [
        1,
        1,
        0,
        0,
        1,
        1,
    ]

    _, error = finish(
        run(tmp_path / "all", fault="nan:", stop_after_bad=3, steps=50), 4
    )
    assert last_line(error).startswith(
        "train.py: 3 consecutive updates up to step 3 had a non-finite loss"
    )
    assert step_numbers(tmp_path / "all" / "checkpoints") == []


def test_a_closed_output_pipe_does_not_end_a_run(tmp_path):
    process = run(tmp_path, steps=5)
    assert process.stdout.readline().startswith("devices")
    process.stdout.close()
    with process.stderr:
        error = process.stderr.read()
    assert process.wait(300) == 0 and error == ""
    assert step_numbers(tmp_path / "checkpoints") == [5]


def test_a_missing_home_and_temporary_folder_is_a_warning(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    _, error = finish(run(tmp_path / "run", steps=2))
    assert "warning: the compilation cache is disabled: neither HOME nor" in error
    assert step_numbers(tmp_path / "run" / "checkpoints") == [2]
