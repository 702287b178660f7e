"""The copy of a run in an object store: a folder behind `file://` stands in for the bucket."""

import json
import os
import shutil
import threading
import time

import numpy as np
import pytest
from saved_steps import (
    IDENTITY,
    PROGRESS,
    damage,
    files_of,
    new_state,
    train_state,
)

from rwkv7_jax.json_files import write_json
from rwkv7_jax.runs.exit_codes import DiskError
from rwkv7_jax.runs.resume import backup
from rwkv7_jax.runs.resume.backup import Backup
from rwkv7_jax.runs.resume.object_store import ObjectStore
from rwkv7_jax.runs.resume.step_directories import StepDirectories
from rwkv7_jax.runs.run_directory import OwnedRunDirectory
from rwkv7_jax.runs.run_lock import LOCK
from rwkv7_jax.runs.settings import DataSettings, Settings, read_settings


@pytest.fixture(autouse=True)
def _short_heartbeats(monkeypatch):
    monkeypatch.setattr(backup, "HEARTBEAT_SECONDS", 0.1)


def _settings(bucket, **changes):
    return Settings(backup=f"file://{bucket}", keep=2, **changes)


def _train(workdir, bucket, steps):
    """Saves steps as a run does, and ends as a finished run."""
    with OwnedRunDirectory(workdir, _settings(bucket)) as folder:
        train, _ = folder.restore(train_state(0), IDENTITY, new_state)
        for step in steps:
            folder.log(step, {"loss_nats": 1.0})
            folder.checkpoints.save(train_state(step), PROGRESS, IDENTITY)
            folder.checkpoints.close()
        (workdir / "state.pth").write_bytes(b"result")
        return int(train.step)


def _restored(workdir, bucket):
    with OwnedRunDirectory(workdir, _settings(bucket)) as folder:
        train, _ = folder.restore(train_state(0), IDENTITY, new_state)
        return int(train.step), [row["step"] for row in folder.rows()]


def test_a_new_machine_resumes_from_the_store_alone(tmp_path):
    _train(tmp_path / "one", tmp_path / "bucket", [1, 2, 3])
    assert _restored(tmp_path / "two", tmp_path / "bucket") == (3, [1, 2, 3])
    assert (tmp_path / "two" / "state.pth").read_bytes() == b"result"


def test_a_new_machine_keeps_the_settings_that_the_run_began_with(tmp_path):
    bucket = tmp_path / "bucket"
    began = _settings(bucket, data=DataSettings(packing="stream"))
    with OwnedRunDirectory(tmp_path / "one", began) as folder:
        folder.checkpoints.save(train_state(1), PROGRESS, IDENTITY)
    left_open = _settings(bucket, data=DataSettings(packing="auto"))
    with OwnedRunDirectory(tmp_path / "two", left_open) as folder:
        assert folder.settings == began


def test_the_store_keeps_the_steps_that_the_run_keeps(tmp_path):
    _train(tmp_path / "one", tmp_path / "bucket", [1, 2, 3])
    steps = {path.name for path in (tmp_path / "bucket" / "checkpoints").iterdir()}
    files = {
        step
        for step in steps
        if any(
            path.is_file()
            for path in (tmp_path / "bucket" / "checkpoints" / step).rglob("*")
        )
    }
    assert files == {"2", "3"}


def test_a_machine_with_older_steps_fetches_the_newer_one(tmp_path):
    _train(tmp_path / "one", tmp_path / "bucket", [1])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert _train(tmp_path / "two", tmp_path / "bucket", [2]) == 1
    assert _restored(tmp_path / "one", tmp_path / "bucket") == (2, [1, 2])


@pytest.mark.parametrize("name", ["files.json", "notes.txt"])
def test_a_fetched_step_replaces_what_is_in_its_way(tmp_path, capfd, name):
    bucket = tmp_path / "bucket"
    _train(tmp_path / "one", bucket, [1, 2])
    step = tmp_path / "one" / "checkpoints" / "2"
    if name == "files.json":
        # A step without a manifest is damaged.
        (step / name).unlink()
    else:
        shutil.rmtree(step)
        step.mkdir()
        (step / name).write_text("of another program")
    assert _restored(tmp_path / "one", bucket) == (2, [1, 2])
    assert f"{step} was in the way; it is now in" in capfd.readouterr().err


@pytest.mark.parametrize("left", [[], [1]])
def test_a_step_that_is_damaged_here_is_fetched_from_the_store(tmp_path, capfd, left):
    bucket = tmp_path / "bucket"
    _train(tmp_path / "one", bucket, [1, 2])
    steps = tmp_path / "one" / "checkpoints"
    for number in {1, 2} - {*left}:
        damage(steps / str(number) / "record" / "metadata", "truncate")
    assert _restored(tmp_path / "one", bucket) == (2, [1, 2])
    said = capfd.readouterr()
    assert "step 2 is damaged" in said.err
    assert said.out.count("was copied from") == 1


def test_a_step_that_has_nan_in_the_store_too_is_fetched_once(tmp_path, capfd):
    bucket = tmp_path / "bucket"
    bad = train_state(2)
    bad.params["matrix"] = bad.params["matrix"].at[0, 0].set(np.nan)
    with OwnedRunDirectory(tmp_path / "one", _settings(bucket)) as folder:
        for train in (train_state(1), bad):
            folder.checkpoints.save(train, PROGRESS, IDENTITY)
            folder.checkpoints.close()
    assert _restored(tmp_path / "one", bucket)[0] == 1
    said = capfd.readouterr()
    assert said.err.count("step 2 is damaged: it has NaN or Inf") == 2
    assert said.out.count("was copied from") == 1


def test_a_machine_with_newer_steps_keeps_them(tmp_path):
    _train(tmp_path / "one", tmp_path / "bucket", [1])
    with OwnedRunDirectory(tmp_path / "one", Settings(keep=2)) as folder:
        folder.restore(train_state(0), IDENTITY, new_state)
        folder.checkpoints.save(train_state(5), PROGRESS, IDENTITY)
        folder.checkpoints.close()
    assert _restored(tmp_path / "one", tmp_path / "bucket")[0] == 5


@pytest.mark.parametrize("steps", [[1], [2], [3]])
def test_the_backup_of_another_run_is_neither_fetched_nor_deleted(
    tmp_path, monkeypatch, steps
):
    bucket = tmp_path / "bucket"
    monkeypatch.setitem(IDENTITY, "inputs", {"data": "this text"})
    _train(tmp_path / "one", bucket, [2])
    kept = {path: path.read_bytes() for path in files_of(bucket)}
    other = {"settings": {"seed": "0"}, "inputs": {"data": "another text"}}
    workdir = tmp_path / "two"
    with OwnedRunDirectory(workdir, Settings(keep=2)) as folder:
        for step in steps:
            folder.checkpoints.save(train_state(step), PROGRESS, other)
        folder.checkpoints.close()
    sentence = (
        r"must be the copy of the run in .*two; .* `data` is this text; got another"
    )
    with pytest.raises(ValueError, match=sentence):
        OwnedRunDirectory(workdir, _settings(bucket))
    for path, content in kept.items():
        assert path.name == LOCK or path.read_bytes() == content
    assert StepDirectories(workdir / "checkpoints").complete() == steps


def test_a_step_whose_copy_failed_is_copied_at_the_end_of_the_next_start(
    tmp_path, monkeypatch
):
    bucket = tmp_path / "bucket"
    _train(tmp_path / "one", bucket, [1])
    upload = Backup._upload_step

    def failing(self, step):
        raise DiskError("UNAVAILABLE: the connection was lost")

    monkeypatch.setattr(Backup, "_upload_step", failing)
    with pytest.raises(DiskError, match="the connection was lost"):
        _train(tmp_path / "one", bucket, [2])
    assert _restored(tmp_path / "two", bucket)[0] == 1
    monkeypatch.setattr(Backup, "_upload_step", upload)
    # The run has ended, so this start saves no step.
    assert _restored(tmp_path / "one", bucket)[0] == 2
    assert _restored(tmp_path / "three", bucket) == (2, [1, 2])


class _FailingStore:
    """A store whose connection ends after some writes."""

    def __init__(self, store, writes):
        self._store = store
        self.left = writes

    def write(self, key, *arguments, **named):
        if key != backup.LOCK:
            self.left -= 1
            if self.left < 0:
                raise ValueError("UNAVAILABLE: the connection was lost")
        return self._store.write(key, *arguments, **named)

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_files_of_a_failed_copy_are_copied_with_the_next_one(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in ("settings.json", "rate_search.json", "state.pth"):
        (workdir / name).write_text(name)
    copy = backup.Backup(ObjectStore(f"file://{tmp_path / 'bucket'}"), workdir)
    opened = copy._store._keys
    copy._store._keys = _FailingStore(opened, 1)
    with pytest.raises(DiskError, match="the connection was lost"):
        copy.copy_files()
    copy._store._keys = opened
    copy.copy_files()
    copy.release()
    for name in ("settings.json", "rate_search.json", "state.pth"):
        assert (tmp_path / "bucket" / name).read_text() == name


def test_a_file_replaced_within_the_same_moment_is_copied_again(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    copy = backup.Backup(ObjectStore(f"file://{tmp_path / 'bucket'}"), workdir)
    for text in ("[1]", "[2]"):
        write_json(workdir / "protected_steps.json", json.loads(text), indent=None)
        os.utime(workdir / "protected_steps.json", ns=(0, 0))
        copy.copy_files()
        stored = tmp_path / "bucket" / "protected_steps.json"
        assert stored.read_text() == f"{text}\n"
    copy.release()


def test_files_that_could_not_be_fetched_are_fetched_at_the_next_start(
    tmp_path, monkeypatch
):
    bucket = tmp_path / "bucket"
    _train(tmp_path / "one", bucket, [1])
    download = ObjectStore.download

    def failing(self, files):
        if "state.pth" in files:
            raise DiskError("UNAVAILABLE: the connection was lost")
        download(self, files)

    monkeypatch.setattr(ObjectStore, "download", failing)
    with pytest.raises(DiskError, match="the connection was lost"):
        OwnedRunDirectory(tmp_path / "two", _settings(bucket))
    monkeypatch.setattr(ObjectStore, "download", download)
    assert _restored(tmp_path / "two", bucket) == (1, [1])
    assert (tmp_path / "two" / "state.pth").read_bytes() == b"result"


@pytest.mark.slow
def test_a_copy_interrupted_after_any_write_leaves_a_complete_step(
    tmp_path, monkeypatch
):
    _train(tmp_path / "one", tmp_path / "before", [1])
    opened = ObjectStore._keys.func
    for writes in range(0, 60, 3):
        bucket = tmp_path / f"bucket{writes}"
        shutil.copytree(tmp_path / "before", bucket)
        workdir = tmp_path / f"run{writes}"
        shutil.copytree(tmp_path / "one", workdir)
        stores = []

        def failing(store, writes=writes, stores=stores):
            # The lock's signs of life come through the same store.
            if not stores:
                stores.append(_FailingStore(opened(store), writes))
            return stores[-1]

        monkeypatch.setattr(ObjectStore, "_keys", property(failing))
        whole = False
        try:
            _train(workdir, bucket, [2])
            whole = True
        except DiskError as error:
            assert "the connection was lost" in str(error)
            assert "`config.backup` file://" in str(error)
        monkeypatch.setattr(ObjectStore, "_keys", property(opened))
        step, _ = _restored(tmp_path / f"fresh{writes}", bucket)
        assert step == 2 if whole else step in (1, 2)
        if whole:
            break
    assert whole
    assert writes > 8


def test_a_damaged_step_in_the_store_is_skipped_for_an_older_one(tmp_path, capfd):
    bucket = tmp_path / "bucket"
    _train(tmp_path / "one", bucket, [1, 2])
    files = (bucket / "checkpoints" / "2").rglob("*")
    largest = max(
        (path for path in files if path.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert _restored(tmp_path / "two", bucket)[0] == 1
    assert f"step 2 in file://{bucket} is damaged" in capfd.readouterr().err


def test_a_store_in_use_by_a_live_process_is_rejected(tmp_path, capfd):
    bucket = tmp_path / "bucket"
    with OwnedRunDirectory(tmp_path / "one", _settings(bucket)):
        with pytest.raises(
            ValueError, match=r"`config\.backup` .* is in use by process"
        ):
            OwnedRunDirectory(tmp_path / "two", _settings(bucket))
    # Released: nothing to wait for.
    capfd.readouterr()
    with OwnedRunDirectory(tmp_path / "two", _settings(bucket)):
        assert "waiting" not in capfd.readouterr().out


def test_a_process_that_lost_its_store_copies_nothing(tmp_path):
    bucket = tmp_path / "bucket"
    copy = backup.Backup(ObjectStore(f"file://{bucket}"), tmp_path / "one")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "metrics.jsonl").write_text("{}\n")
    # The process was away for longer than others wait.
    copy._released.set()
    other = backup.Backup(ObjectStore(f"file://{bucket}"), tmp_path / "two")
    copy._released.clear()
    copy._beat()
    with pytest.raises(DiskError, match="another process has taken over its lock"):
        copy.copy_files()
    assert not (bucket / "metrics.jsonl").exists()
    other.release()


def test_a_heartbeat_without_an_answer_does_not_lose_the_store(tmp_path):
    copy = backup.Backup(ObjectStore(f"file://{tmp_path / 'bucket'}"), tmp_path / "one")
    copy._released.set()
    copy._heart.join()
    # Written by the store, but its generation never came back.
    assert copy._write_lock(copy._generation)
    copy._released.clear()
    beats = threading.Thread(target=copy._beat, daemon=True)
    beats.start()
    time.sleep(3 * backup.HEARTBEAT_SECONDS)
    copy.copy_files()
    copy._released.set()
    beats.join()
    assert copy._generation == copy._store.read(LOCK)[1]
    copy.release()


def test_keys_outside_the_folder_are_not_fetched(tmp_path):
    for key in ("../x", "/etc/x", "a/../../x", "run.lock", ".a.b", "checkpoints/1/x"):
        assert not backup._is_copied(key)
    assert backup._is_copied("rate_search/metrics.jsonl")


@pytest.mark.parametrize(
    "url",
    [
        "gs://bucket",
        "bucket/run",
        "https://x/y",
        "file://host/x",
        "/tmp/x",
        "gs://b/ x",
    ],
)
def test_a_backup_that_is_not_a_store_folder_is_rejected(url):
    with pytest.raises(
        ValueError, match=r"`config\.backup` must be gs://bucket/folder"
    ):
        read_settings({"backup": url})


def test_a_store_inside_the_run_directory_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="must be outside the run directory"):
        OwnedRunDirectory(tmp_path, _settings(tmp_path / "inner"))


def test_an_unwritable_store_is_reported_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DiskError, match=r"`config\.backup` file://.* cannot be read or"
    ):
        OwnedRunDirectory(tmp_path / "run", _settings(tmp_path / "file"))


def test_a_report_that_cannot_be_written_does_not_hide_how_the_run_ended(
    tmp_path, monkeypatch, capfd
):
    def full(path):
        raise OSError(27, "File too large")

    monkeypatch.setattr("rwkv7_jax.runs.run_directory.write_report", full)
    with pytest.raises(DiskError, match="the newest save failed"):
        with OwnedRunDirectory(tmp_path, Settings()) as folder:
            folder.log(1, {"loss_nats": 1.0})
            raise DiskError("the newest save failed")
    assert "the report of" in capfd.readouterr().err


def test_the_lock_names_its_holder(tmp_path):
    with OwnedRunDirectory(tmp_path / "one", _settings(tmp_path / "bucket")):
        holder = json.loads((tmp_path / "bucket" / "run.lock").read_text())
        assert holder["pid"]
