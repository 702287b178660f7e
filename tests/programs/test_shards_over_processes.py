"""Weights, moments and checkpoints sharded over two processes with one device each."""

import json
import shutil
import signal
import time

import pytest
from run_programs import SMALLEST, devices, finish, last_line, start, start_pair
from smallest_runs import save_base_model

from rwkv7_jax.runs.multihost import HEARTBEAT_SECONDS
from rwkv7_jax.runs.resume.step_directories import saved_steps, step_numbers

pytestmark = pytest.mark.slow

MESH = "fsdp=2"
RUN = {
    **SMALLEST,
    "mesh": MESH,
    "data.batch_size": 4,
    "save_every": 2,
    "evaluation.every": 2,
    "sample.prompts": "('ab',)",
    "sample.tokens": 4,
}


def rows(workdir):
    """The logged metrics of every step, without times."""
    text = (workdir / "metrics.jsonl").read_text()
    kept = []
    for line in text.splitlines():
        row = json.loads(line)
        names = [name for name in row if name in ("step", "loss", "grad_norm")]
        names += [name for name in row if name.endswith(("accuracy", "reward"))]
        kept.append({name: row[name] for name in names})
    return kept


def samples(workdir):
    return (workdir / "samples.jsonl").read_text()


def leaves(workdir, step):
    """The checksum of every leaf of a checkpoint."""
    path = workdir / "checkpoints" / str(step) / "record" / "metadata"
    return json.loads(path.read_text())["leaves"]


def alone(workdir, **settings):
    """Runs one process with the same mesh to its end; returns its output."""
    run = {**RUN, **settings}
    return finish(start(workdir, environment=devices(2), **run))[0]


def together(workdir, **settings):
    """Runs two processes to their end; returns the output of each."""
    processes = start_pair(workdir, **{**RUN, **settings})
    return [finish(process)[0] for process in processes]


def wait_for_checkpoint(folder, processes):
    end = time.monotonic() + 400
    while not step_numbers(folder / "checkpoints"):
        assert time.monotonic() < end
        for process in processes:
            if process.poll() is not None:
                finish(process)
        time.sleep(0.05)


def state_tuning(folder, **sizes):
    """Writes a base model; returns the settings of a run that tunes a state for it."""
    base = folder / "base.pth"
    save_base_model(base, **sizes)
    run = {name: one for name, one in RUN.items() if not name.startswith("model.")}
    return run | {"config": "state_tuning", "init": base, "model.dtype": "float32"}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A run that lost its second process: folder, first process, and seconds until that ended."""
    folder = tmp_path_factory.mktemp("broken")
    one, other = start_pair(folder, **{**RUN, "steps": 1_000_000})
    wait_for_checkpoint(folder, (one, other))
    other.kill()
    began = time.monotonic()
    _, error = one.communicate(timeout=HEARTBEAT_SECONDS + 60)
    other.communicate()
    return folder, one.returncode, error, time.monotonic() - began


def test_a_process_that_loses_the_other_ends_within_a_minute(broken):
    _, code, error, seconds = broken
    assert code in (6, -signal.SIGABRT), error[-2000:]
    assert seconds < 60


def test_a_run_moves_from_two_processes_to_one_and_back_bit_exactly(broken, tmp_path):
    folder = broken[0]
    before = step_numbers(folder / "checkpoints")[0]
    # A restored leaf is compared with the checksum of the one that was saved.
    assert f"from step {before}" in alone(folder, steps=before + 2)
    first, second = together(folder, steps=before + 4)
    assert f"from step {before + 2}" in first and "resume" not in second
    assert not (folder / "checkpoints" / "bad").exists()
    alone(tmp_path, steps=before + 4)
    assert leaves(folder, before + 4) == leaves(tmp_path, before + 4)
    assert rows(folder) == rows(tmp_path)
    assert samples(folder) == samples(tmp_path)
    ours = folder / "model.pth"
    theirs = tmp_path / "model.pth"
    assert ours.read_bytes() == theirs.read_bytes()
    # Without a mesh, on one device.
    moved = shutil.copytree(folder, tmp_path / "moved")
    settings = {**RUN, "mesh": "auto", "steps": before + 5}
    said, _ = finish(start(moved, environment=devices(1), **settings))
    assert f"from step {before + 4}" in said


@pytest.mark.parametrize("mesh", ["sequence=2", "tensor=2"])
def test_a_signal_to_one_process_stops_both_of_a_tensor_or_sequence_mesh(
    tmp_path, mesh
):
    # Of two heads.
    run = {**RUN, "mesh": mesh, "model.width": 32, "steps": 1_000_000}
    pair = start_pair(tmp_path, **run)
    wait_for_checkpoint(tmp_path, pair)
    pair[1].send_signal(signal.SIGTERM)
    for process in pair:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error[-2000:]


@pytest.mark.parametrize("mesh", [MESH, "data=2"])
def test_two_processes_tune_a_state_on_its_own_answers_bit_exactly_as_one_does(
    tmp_path, mesh
):
    run = state_tuning(tmp_path) | {
        "steps": 2,
        "optimizer.learning_rate": 0.1,
        "mesh": mesh,
        "mode": "test_time",
        "data.path": "task:steer",
        "test_time.verifier": "smallest_runs:odd_sum",
        "test_time.prompts": 2,
        "test_time.group": 4,
        "test_time.tokens": 6,
        "test_time.redraws": 1,
    }
    # Generated rows have no such sizes.
    for name in ("data.length", "data.batch_size", "evaluation.length"):
        del run[name]
    processes = start_pair(tmp_path / "two", **run)
    for process in processes:
        finish(process)
    finish(start(tmp_path / "one", environment=devices(2), **run))
    assert leaves(tmp_path / "two", 2) == leaves(tmp_path / "one", 2)
    measured = [rows(tmp_path / name) for name in ("two", "one")]
    assert measured[0] == measured[1]
    assert any("reward" in row for row in measured[0])
    for name in ("state.pth", "state.pth.json"):
        ours = tmp_path / "two" / name
        theirs = tmp_path / "one" / name
        assert ours.read_bytes() == theirs.read_bytes()


def test_processes_that_share_heads_report_torn_data_of_one_and_save_the_state(
    tmp_path,
):
    # Of two heads.
    run = state_tuning(tmp_path, head_size=8) | {
        "steps": 1,
        "optimizer.learning_rate": 0.1,
        "mesh": "tensor=2",
    }
    torn = start_pair(
        tmp_path / "two",
        child=["tests/support/faulty_train.py"],
        environment={"FAULT": "torn"},
        **run,
    )
    ends = [last_line(finish(process, 2)[1]) for process in torn]
    assert ends[0] == ends[1] == "train.py: `task:mapping` is torn."
    for process in start_pair(tmp_path / "two", **run):
        finish(process)
    finish(start(tmp_path / "one", environment=devices(2), **run))
    saved = [(tmp_path / name / "state.pth").read_bytes() for name in ("two", "one")]
    assert saved[0] == saved[1]


def test_a_failed_save_in_one_process_ends_all_with_the_same_message(tmp_path):
    faulty = "tests/support/faulty_train.py"
    processes = start_pair(
        tmp_path / "run",
        child=[faulty],
        environment={"FAULT": "shards:9"},
        **{**RUN, "steps": 2, "save_every": 0},
    )
    ends = [last_line(finish(process, 5)[1]) for process in processes]
    assert ends[0] == ends[1]
    assert "the checkpoint of step 2 could not be written" in ends[0]
    # What the second process says, and not that the first one waited for it in vain: the operating
    # system's words, or those of TensorStore, whichever of the two comes to write first.
    assert "File too large" in ends[0] or "local file" in ends[0]
    assert not step_numbers(tmp_path / "run" / "checkpoints")


def test_processes_without_a_common_folder_are_rejected(tmp_path):
    processes = start_pair(tmp_path / "one", others=tmp_path / "other", **RUN)
    ends = [last_line(finish(process, 2)[1]) for process in processes]
    assert ends[0] == ends[1]
    assert "must be one folder that all processes see" in ends[0]


def test_processes_without_a_common_folder_keep_their_shards_in_the_backup(tmp_path):
    bucket = tmp_path / "bucket"
    run = {**RUN, "backup": f"file://{bucket}"}
    for steps, before in ((4, None), (6, 4)):
        # Fresh machines each time: what they continue from is in the store alone.
        one = tmp_path / f"{steps}a"
        other = tmp_path / f"{steps}b"
        pair = start_pair(one, others=other, **{**run, "steps": steps})
        said, _ = [finish(process)[0] for process in pair]
        assert not step_numbers(one / "checkpoints") and not other.exists()
        assert before is None or f"from step {before}" in said
    alone(tmp_path / "moved", backup=run["backup"], steps=8)
    assert saved_steps(bucket / "checkpoints") == [8, 6]
    alone(tmp_path / "whole", steps=8)
    moved = tmp_path / "moved"
    whole = tmp_path / "whole"
    assert leaves(moved, 8) == leaves(whole, 8)
    assert rows(moved) == rows(whole)
    assert samples(moved) == samples(whole)
    assert (moved / "model.pth").read_bytes() == (whole / "model.pth").read_bytes()


def test_a_search_for_a_rate_needs_no_common_folder_either(tmp_path):
    run = state_tuning(tmp_path) | {
        "optimizer.learning_rate": "none",
        "tuning.rates": "(0.01, 0.1)",
        "steps": 4,
    }
    one = tmp_path / "one"
    backup = f"file://{tmp_path / 'bucket'}"
    pair = start_pair(one, others=tmp_path / "other", backup=backup, **run)
    for process in pair:
        finish(process)
    finish(start(tmp_path / "whole", environment=devices(2), **run))
    found = [
        json.loads((folder / "rate_search.json").read_text())["states"]
        for folder in (one, tmp_path / "whole")
    ]
    assert found[0] == found[1]
    assert (one / "state.pth").read_bytes() == (
        tmp_path / "whole" / "state.pth"
    ).read_bytes()
