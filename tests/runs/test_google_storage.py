"""Runs whose backup or shards are in Google Cloud Storage, through its own protocol."""

import importlib.util

import pytest
from google_storage import serve_storage
from run_programs import SMALLEST, finish, start_pair
from saved_steps import IDENTITY, PROGRESS, new_state, train_state

from rwkv7_jax.runs.resume import backup
from rwkv7_jax.runs.run_directory import OwnedRunDirectory
from rwkv7_jax.runs.settings import Settings


@pytest.fixture(scope="module")
def bucket():
    """A bucket, and the environment variables by which programs find it."""
    with serve_storage() as served, pytest.MonkeyPatch.context() as patch:
        for name, value in served[1].items():
            patch.setenv(name, value)
        yield served


def restored(workdir, settings):
    with OwnedRunDirectory(workdir, settings) as folder:
        train, _ = folder.restore(train_state(0), IDENTITY, new_state)
        return int(train.step), [row["step"] for row in folder.rows()]


def test_a_new_machine_resumes_unless_a_live_process_uses_the_store(
    bucket, tmp_path, monkeypatch
):
    monkeypatch.setattr(backup, "HEARTBEAT_SECONDS", 0.2)
    settings = Settings(backup="gs://bucket/copy", keep=2)
    with OwnedRunDirectory(tmp_path / "one", settings) as folder:
        for step in (1, 2, 3):
            folder.log(step, {"loss_nats": 1.0})
            folder.checkpoints.save(train_state(step), PROGRESS, IDENTITY)
            folder.checkpoints.close()
        with pytest.raises(ValueError, match="gs://bucket/copy is in use by process"):
            OwnedRunDirectory(tmp_path / "two", settings)
    assert restored(tmp_path / "two", settings) == (3, [1, 2, 3])
    objects = bucket[0].objects
    manifests = [name for name in objects if name.endswith("/files.json")]
    assert manifests == [f"copy/checkpoints/{step}/files.json" for step in (2, 3)]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed"
)
def test_two_processes_keep_their_shards_in_the_bucket(bucket, tmp_path):
    run = {
        **SMALLEST,
        "mesh": "fsdp=2",
        "data.batch_size": 4,
        "save_every": 2,
        "backup": "gs://bucket/shards",
    }
    for steps, others in ((2, None), (4, tmp_path / "second")):
        # The second time on fresh machines.
        folder = tmp_path / str(steps)
        pair = start_pair(
            folder,
            others=others or tmp_path / "first",
            environment=bucket[1],
            steps=steps,
            **run,
        )
        said, _ = [finish(process)[0] for process in pair]
        assert not any((folder / "checkpoints").iterdir())
    assert "from step 2" in said
    objects = bucket[0].objects
    for process in (0, 1):
        place = f"shards/checkpoints/4/train/ocdbt.process_{process}/"
        assert any(name.startswith(place) for name in objects)
