"""Checkpoints in an object store: a folder behind `file://` stands in for the bucket."""

import importlib.util

import pytest
from random_checkpoints import differing
from saved_steps import (
    IDENTITY,
    PROGRESS,
    damage,
    files_of,
    new_state,
    train_state,
)

from rwkv7_jax.runs.exit_codes import DiskError, NoValidCheckpoint
from rwkv7_jax.runs.resume.backup import Backup
from rwkv7_jax.runs.resume.checkpointer import Checkpointer
from rwkv7_jax.runs.resume.object_store import ObjectStore
from rwkv7_jax.runs.resume.stored_steps import StoredSteps
from rwkv7_jax.runs.settings import Settings


def steps_of(bucket):
    return StoredSteps(ObjectStore(f"file://{bucket}"), "checkpoints")


def open_checkpoints(bucket, **settings):
    return Checkpointer(steps_of(bucket), bucket.parent / "run", Settings(**settings))


def save_steps(bucket, numbers, **settings):
    checkpoints = open_checkpoints(bucket, **settings)
    for number in numbers:
        checkpoints.save(train_state(number), PROGRESS, IDENTITY)
    checkpoints.close()


def restored_step(bucket):
    """Returns the restored step; its state must equal the saved one bit-exactly."""
    found, _ = open_checkpoints(bucket).restore(train_state(0), IDENTITY, new_state)
    assert differing(found, train_state(int(found.step))) == []
    return int(found.step)


@pytest.fixture
def bucket(tmp_path):
    """Steps 3 and 6, both intact."""
    save_steps(tmp_path / "bucket", [3, 6])
    return tmp_path / "bucket"


def test_the_newest_step_is_restored_and_a_new_run_has_none(bucket, tmp_path):
    assert restored_step(bucket) == 6
    assert restored_step(tmp_path / "other") == 0


def test_retention_equals_that_of_directories(tmp_path):
    save_steps(tmp_path, range(1, 10), keep=2, keep_every=4)
    assert steps_of(tmp_path).complete() == [9, 8, 4]


@pytest.mark.parametrize("how", [0, "truncate", "delete", "zero"])
def test_a_step_with_a_damaged_file_is_skipped(bucket, how, capfd):
    folder = bucket / "checkpoints" / "6"
    manifest = folder / "files.json"
    for path in files_of(folder):
        before = path.read_bytes()
        # Without a manifest a step was never finished.
        if not before or (path == manifest and how == "delete"):
            continue
        damage(path, how)
        assert restored_step(bucket) == 3, path
        assert "step 6 is damaged: " in capfd.readouterr().err, path
        (folder / "bad.json").rename(manifest)
        path.write_bytes(before)
    assert restored_step(bucket) == 6


def test_an_unfinished_step_without_a_manifest_is_removed(bucket, capfd):
    folder = bucket / "checkpoints" / "6"
    damage(folder / "files.json", "delete")
    assert restored_step(bucket) == 3
    assert "damaged" not in capfd.readouterr().err
    assert not files_of(folder)


def test_a_run_with_only_damaged_steps_does_not_start_anew(bucket):
    for number in (3, 6):
        damage(bucket / "checkpoints" / str(number) / "record" / "metadata", "zero")
    # The second time, they count no longer already.
    for _ in range(2):
        with pytest.raises(NoValidCheckpoint, match=r"no checkpoint in .* is intact"):
            restored_step(bucket)
    assert steps_of(bucket).complete() == []
    save_steps(bucket, [6])
    assert restored_step(bucket) == 6


def test_leftovers_of_a_killed_process_are_removed(bucket):
    for name in ("9", "9.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-12"):
        inner = bucket / "checkpoints" / name / "train"
        inner.mkdir(parents=True)
        (inner / "d").write_text("half")
    (bucket / "checkpoints" / "notes.txt").write_text("mine")
    assert restored_step(bucket) == 6
    left = {path.parent.name for path in files_of(bucket / "checkpoints")}
    assert "notes.txt" in {path.name for path in files_of(bucket / "checkpoints")}
    assert not any(name.startswith("9") for name in left)
    save_steps(bucket, [9])
    assert restored_step(bucket) == 9


def test_a_failed_save_keeps_the_older_steps(bucket, monkeypatch):
    def lost(store, key, value):
        raise DiskError("the connection was lost")

    checkpoints = open_checkpoints(bucket)
    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "put", lost)
        checkpoints.save(train_state(9), PROGRESS, IDENTITY)
        with pytest.raises(DiskError, match=r"step 9 could not be written: it needs"):
            checkpoints.close()
    checkpoints.save(train_state(12), PROGRESS, IDENTITY)
    checkpoints.close()
    assert restored_step(bucket) == 12
    assert steps_of(bucket).complete() == [12, 6]


def test_a_store_that_is_unavailable_during_a_save_does_not_end_the_run(
    bucket, monkeypatch, capfd
):
    checkpoints = open_checkpoints(bucket)

    def away(store):
        raise ValueError("UNAVAILABLE: no such host")

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "_keys", property(away))
        checkpoints.save(train_state(9), PROGRESS, IDENTITY)
        checkpoints.wait()
    said = capfd.readouterr().err
    assert "step 9 could not be written" in said and "is unavailable" in said
    checkpoints.save(train_state(12), PROGRESS, IDENTITY)
    checkpoints.close()
    assert restored_step(bucket) == 12


def test_a_process_that_lost_its_store_completes_no_step(bucket, tmp_path):
    (tmp_path / "run").mkdir()
    backup = Backup(ObjectStore(f"file://{bucket}"), tmp_path / "run")
    checkpoints = Checkpointer(backup.steps, tmp_path / "run", Settings())
    backup._displaced = True
    # What the other process is writing.
    theirs = bucket / "checkpoints" / "9" / "train"
    theirs.mkdir(parents=True)
    (theirs / "d").write_text("half")
    checkpoints.save(train_state(9), PROGRESS, IDENTITY)
    with pytest.raises(DiskError, match="another process has taken over its lock"):
        checkpoints.close()
    assert (theirs / "d").read_text() == "half"
    backup.release()
    assert restored_step(bucket) == 6


def test_a_store_that_orbax_cannot_reach_is_rejected_with_what_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gs://b/run needs gcsfs, .*: pip install"):
        ObjectStore("gs://b/run").check_folder()


def test_a_step_in_the_store_has_the_files_of_a_step_in_the_run_directory(
    bucket, tmp_path
):
    run = tmp_path / "run"
    backup = Backup(ObjectStore(f"file://{bucket}"), run)
    backup.fetch_step()
    backup.release()
    names = sorted(path.name for path in files_of(run / "checkpoints" / "6"))
    assert names == sorted(path.name for path in files_of(bucket / "checkpoints" / "6"))
