"""The run directory: which lines a resume drops, and which directories are rejected."""

import os
import shutil

import numpy as np
import pytest

from rwkv7_jax.data.jsonl import read_log
from rwkv7_jax.reports import metric_writers
from rwkv7_jax.runs import run_folder
from rwkv7_jax.runs.exit_codes import DiskError, InUse
from rwkv7_jax.runs.run_directory import NullRunDirectory, OwnedRunDirectory
from rwkv7_jax.runs.settings import OptimizerSettings, Settings


def test_metrics_after_the_restored_step_are_dropped_and_broken_lines_ignored(tmp_path):
    with OwnedRunDirectory(tmp_path, Settings()) as folder:
        for step in (1, 2, 3):
            folder.log(step, {"loss_nats": 0.5 * step, "learning_rate": 0.1})
        folder.log_bad(3, {"loss": float("nan")}, np.ones((1, 2), int))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with OwnedRunDirectory(tmp_path, Settings()) as folder:
        assert [row["step"] for row in folder.rows()] == [1, 2, 3]
        folder.resume_at(2)
        assert [row["step"] for row in folder.rows()] == [1, 2]
        assert read_log(tmp_path / "bad_batches.jsonl") == []
        events = [row["event"] for row in read_log(tmp_path / "events.jsonl")]
        assert events == ["skipped", "resume"]
    assert "resume" in (tmp_path / "report.html").read_text()


def test_a_directory_with_other_settings_is_rejected_by_the_setting(tmp_path):
    with OwnedRunDirectory(tmp_path, Settings()):
        (tmp_path / "checkpoints" / "5").mkdir()
    other = Settings(optimizer=OptimizerSettings(learning_rate=0.5), log_every=3)
    with pytest.raises(
        ValueError, match=r"`optimizer\.learning_rate` is 0\.0006; got 0\.5"
    ):
        OwnedRunDirectory(tmp_path, other)
    with OwnedRunDirectory(tmp_path, Settings(log_every=3)):
        pass


def test_a_directory_that_cannot_be_created_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"`--workdir` .*/run cannot be written"):
        OwnedRunDirectory(tmp_path / "file" / "run", Settings())


@pytest.mark.parametrize("kind", ["file", "link to nowhere", "link to itself"])
def test_something_else_in_place_of_the_directory_is_named(tmp_path, kind):
    place = tmp_path / "run"
    if kind == "file":
        place.write_text("")
    else:
        place.symlink_to(place if kind == "link to itself" else tmp_path / "none")
    with pytest.raises(
        ValueError, match=r"`--workdir` must be a folder; .*run` is not"
    ):
        OwnedRunDirectory(place, Settings())


def test_a_run_whose_directory_was_replaced_leaves_the_new_one_alone(tmp_path):
    place = tmp_path / "run"
    with pytest.raises(
        InUse, match=rf"run` was taken over by process {os.getpid()} on"
    ):
        with OwnedRunDirectory(place, Settings()) as old:
            old.log(1, {"loss": 1.0})
            shutil.rmtree(place)
            # Nobody else has begun.
            place.mkdir()
            old.log(2, {"loss": 1.0})
            old.require_lock()
            shutil.rmtree(place)
            new = OwnedRunDirectory(place, Settings())
            new.log(1, {"loss": 2.0})
            before = {path: path.read_bytes() for path in place.glob("*.*")}
            old.log(3, {"loss": 1.0})
    assert before == {path: path.read_bytes() for path in place.glob("*.*")}
    new._lock.release()


OF_OTHERS = {
    "samples.jsonl": '{"text": "a poem"}\n',
    "metrics.jsonl": '{"loss": 1}\n',
    "bad_batches.jsonl": "not JSON\n",
    "metrics.csv": "name,value\n",
    "settings.json": '{"editor.fontSize": 12}',
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_files_of_something_else_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text(OF_OTHERS[name])
    with pytest.raises(
        ValueError, match=rf"`--workdir` must be a new .* has {name} of"
    ):
        OwnedRunDirectory(tmp_path, Settings())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == OF_OTHERS[name]


@pytest.mark.parametrize("empties", [True, False])
def test_the_files_of_a_run_are_known_without_its_lock(tmp_path, empties):
    with OwnedRunDirectory(tmp_path / "one", Settings()) as folder:
        folder.log(1, {"loss": 1.0})
        folder.note_sample(1, "a", "b")
        folder.log_bad(1, {"loss": 1.0}, np.ones((1, 2), int))
    (tmp_path / "one" / "run.lock").unlink()
    if empties:
        # A killed process or a full disk may leave nothing in them.
        for name in OF_OTHERS:
            (tmp_path / "one" / name).write_text("")
    with OwnedRunDirectory(tmp_path / "one", Settings()) as folder:
        assert len(folder.rows()) == (not empties)


def test_a_directory_that_cannot_be_read_is_a_disk_error(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(run_folder, "read_object", fail)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(DiskError, match=r"`--workdir` .* cannot be written: .*denied"):
        OwnedRunDirectory(tmp_path, Settings())


class _LostService:
    """A tracker whose service is unreachable."""

    def __init__(self, package, folder, first_step):
        pass

    def write(self, step, numbers):
        raise RuntimeError("no reply\nin 90 seconds")

    def close(self):
        raise RuntimeError("no reply")


def test_a_tracker_that_fails_costs_neither_the_run_nor_its_files(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setitem(metric_writers._TRACKERS, "wandb", ("json", _LostService))
    bucket = tmp_path / "bucket"
    settings = Settings(trackers=("wandb",), backup=f"file://{bucket}")
    with (
        pytest.warns(UserWarning, match="tracker wandb failed: no reply; it") as warned,
        OwnedRunDirectory(tmp_path / "run", settings) as folder,
    ):
        for step in (1, 2):
            folder.log(step, {"loss_nats": 1.0})
    assert len(warned) == 1
    for place in (tmp_path / "run", bucket):
        assert len(read_log(place / "metrics.jsonl")) == 2
        assert (place / "report.html").exists()
    # Both locks are free again.
    with OwnedRunDirectory(tmp_path / "run", settings):
        assert "waiting" not in capfd.readouterr().out


def test_only_process_0_prints_a_warning_about_the_whole_run(tmp_path, capsys):
    with OwnedRunDirectory(tmp_path / "run", Settings()) as folder:
        other = NullRunDirectory(tmp_path / "temporary", folder.path, Settings(), {})
        for directory in (folder, other):
            directory.warn("the state is large")
    assert capsys.readouterr().err == "warning: the state is large\n"
