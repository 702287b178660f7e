"""The driver of a device run: what a failing step loses and keeps."""

import itertools
import json
import sys
import time

import pytest

from benchmarks import device_run, record
from benchmarks.device import correctness
from benchmarks.device.__main__ import share
from benchmarks.device.sizes import Job
from pallas_kernels import tiles

FOUND = "print('{\"x\": 1}', flush=True); "


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(path, code, seconds=60.0):
    record = device_run.Record(path, card="none")
    return device_run.run_process("a", [sys.executable, "-c", code], record, seconds)


def test_a_finished_step_leaves_its_results_and_a_status(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"older": true}\n')
    assert run(path, FOUND + "print('a compiler speaks')") == "ok"
    older, found, status = lines(path)
    assert older == {"older": True}
    assert found == {"step": "a", "card": "none", "x": 1}
    assert status["status"] == "ok"


def test_a_crashed_step_keeps_its_earlier_results(tmp_path):
    code = (
        FOUND + "import os, sys; print('why', file=sys.stderr, flush=True); os.abort()"
    )
    assert run(tmp_path / "x.jsonl", code) == "failed"
    found, status = lines(tmp_path / "x.jsonl")
    assert found["x"] == 1
    assert status["exit code"] != 0
    assert "why" in status["error"]


def test_a_hanging_step_is_killed_with_its_children_at_the_time_limit(tmp_path):
    sleep = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    code = FOUND + f"import subprocess, sys; subprocess.run({sleep})"
    assert run(tmp_path / "x.jsonl", code, seconds=3.0) == "time limit"
    found, status = lines(tmp_path / "x.jsonl")
    assert found["x"] == 1
    assert status["seconds"] < 30


def test_a_failed_result_fails_the_step(tmp_path):
    code = 'print(\'{"result": "failed: wrong"}\')'
    assert run(tmp_path / "x.jsonl", code) == "failed"


def test_steps_without_time_left_are_recorded_as_skipped(tmp_path):
    record = device_run.Record(tmp_path / "x.jsonl", card="none")
    steps = list(device_run.STEPS[:2])
    statuses = device_run.run_steps(steps, record, total_seconds=1.0, rehearse=True)
    assert set(statuses.values()) == {"skipped"}
    names = [line["step"] for line in lines(tmp_path / "x.jsonl")]
    assert names == [step.name for step in steps]


def test_the_measurements_fit_into_each_calls_time_limit():
    left = (1 - device_run.TOGETHER) * device_run.CALL_SECONDS
    for call in (1, 2, 3):
        assert left >= sum(
            step.seconds for step in device_run.STEPS if step.call == call
        )


def test_without_a_gpu_only_a_rehearsal_is_allowed(monkeypatch):
    monkeypatch.setattr(device_run, "card", lambda: "cpu")
    with pytest.raises(SystemExit, match="there is no NVIDIA GPU here; use --rehearse"):
        device_run.main(["--call", "1"])


def test_workers_compile_and_one_process_measures():
    step = device_run.Step("times", 2, 3, 60)
    workers, alone = device_run.commands_of(step, rehearse=False)
    assert [command[-4:] for command in workers] == [
        ["--part", str(part), "3", "--warm"] for part in range(3)
    ]
    assert alone == workers[0][:-4]
    # Checks need no time alone.
    workers, alone = device_run.commands_of(step._replace(seconds=0), rehearse=False)
    assert len(workers) == 3
    assert alone is None


def test_every_job_is_in_exactly_one_part():
    jobs = [Job({"number": number}, dict) for number in range(7)]
    parts = [share(iter(jobs), part, 3) for part in range(3)]
    assert list(itertools.chain.from_iterable(parts)) == jobs


def test_workers_run_in_parallel_and_the_worst_status_counts(tmp_path):
    record = device_run.Record(tmp_path / "x.jsonl", card="none")
    good, bad = ([sys.executable, "-c", code] for code in (FOUND, "exit(3)"))
    commands = {"a": [good, bad], "b": [good], "c": []}
    statuses = device_run.run_together(commands, record, time.monotonic() + 60)
    assert statuses == {"a": "failed", "b": "ok"}
    assert sum("x" in line for line in lines(tmp_path / "x.jsonl")) == 2


@pytest.mark.parametrize(
    "printed",
    [
        ["a compiler speaks", "ERROR SUMMARY: 0 errors"],
        [
            '{"name": "a", "result": "ok"}',
            '{"name": "b", "result": "failed: no memory"}',
        ],
    ],
)
def test_a_sanitizer_run_without_kernels_is_an_error(printed):
    with pytest.raises(ArithmeticError, match=r"no kernel ran|b: failed: no memory"):
        correctness.right_kernels(printed)
    assert correctness.right_kernels(['{"name": "a", "result": "ok"}']) == ["a"]


def test_a_tile_is_tested_only_in_the_passes_it_changes():
    one = tiles.Tile(4, 2, 64)
    table = tiles.GPU(32, one, one, one)
    other = tiles.Tile(2, 2, 64)
    assert correctness.passes_of(table, table) == (False, True)
    assert correctness.passes_of(table._replace(chunk=16), table) == (False, True)
    assert correctness.passes_of(table._replace(forward=other), table) == (False,)
    assert correctness.passes_of(table._replace(state=other), table) == (True,)


def test_the_result_folder_is_created(tmp_path):
    record.write(str(tmp_path / "new" / "a.json"), "benchmarks.none", numbers=[1])
    assert json.loads((tmp_path / "new" / "a.json").read_text())["numbers"] == [1]


@pytest.mark.slow
def test_the_rehearsal_runs_every_step(tmp_path):
    path = tmp_path / "x.jsonl"
    device_run.main(["--rehearse", "--out", str(path), "--seconds", "900"])
    statuses = {
        line["step"]: line["status"] for line in lines(path) if "status" in line
    }
    assert statuses == dict.fromkeys((step.name for step in device_run.STEPS), "ok")
