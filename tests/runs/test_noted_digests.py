"""Digests of a step that several processes wrote: each reads its own files back."""

import threading

import pytest

from rwkv7_jax.runs.resume.noted_digests import names_of, note_name
from rwkv7_jax.runs.resume.object_store import ObjectStore
from rwkv7_jax.runs.resume.step_directories import StepDirectories
from rwkv7_jax.runs.resume.stored_steps import StoredSteps

PROCESSES = (0, 1, 2)


class CountingStore(ObjectStore):
    """A store that notes the names of values which it digests."""

    def __init__(self, url):
        super().__init__(url)
        self.read_back = []

    def digests(self, keys):
        self.read_back += keys
        return super().digests(keys)


def _write_step(folder):
    """Writes what Orbax leaves of three processes; the first one merges their indices."""
    for process in PROCESSES:
        data = folder / "train" / f"ocdbt.process_{process}" / "d"
        data.mkdir(parents=True)
        (data / "shards").write_bytes(bytes([process]) * 1000)
    (folder / "train" / "manifest.ocdbt").write_bytes(b"index")
    (folder / "record").mkdir()
    (folder / "record" / "metadata").write_bytes(b"{}")


def _stored(tmp_path):
    places = [
        StoredSteps(CountingStore(f"file://{tmp_path}"), "checkpoints")
        for _ in PROCESSES
    ]
    _write_step(tmp_path / "checkpoints" / "7")
    return places


def _in_directories(tmp_path):
    places = [StepDirectories(tmp_path / "checkpoints") for _ in PROCESSES]
    _write_step(places[0].unfinished(7))
    return places


def _commit(places):
    """Commits step 7 by all of its processes, of which the first is the earliest."""
    others = [
        threading.Timer(0.3, place.note_digests, (7, process))
        for process, place in enumerate(places[1:], 1)
    ]
    for other in others:
        other.start()
    places[0].commit(7, others=PROCESSES[1:], seconds=60)
    for other in others:
        other.join()


@pytest.mark.parametrize("make", [_stored, _in_directories])
def test_a_manifest_has_the_files_of_all_processes_and_no_notes(tmp_path, make):
    places = make(tmp_path)
    _commit(places)
    assert places[0].numbers() == [7]
    assert places[0].broken_files(7) == []
    folder = tmp_path / "checkpoints" / "7"
    assert not list(folder.glob("digests.*"))
    shards = folder / "train" / "ocdbt.process_2" / "d" / "shards"
    shards.write_bytes(b"damaged")
    assert places[0].broken_files(7) == ["train/ocdbt.process_2/d/shards"]


def test_each_process_reads_its_own_files_back(tmp_path):
    places = _stored(tmp_path)
    _commit(places)
    first, second, third = (place._store.read_back for place in places)
    assert second == ["train/ocdbt.process_1/d/shards"]
    assert third == ["train/ocdbt.process_2/d/shards"]
    assert sorted(first) == [
        "record/metadata",
        "train/manifest.ocdbt",
        "train/ocdbt.process_0/d/shards",
    ]


@pytest.mark.parametrize("make", [_stored, _in_directories])
def test_a_step_of_which_a_note_does_not_come_does_not_count(tmp_path, make):
    places = make(tmp_path)
    places[1].note_digests(7, 1)
    with pytest.raises(
        TimeoutError, match=r"process 2 did not note its digests within 0 s"
    ):
        places[0].commit(7, others=PROCESSES[1:])
    assert places[0].numbers() == []


def test_a_note_that_is_half_written_is_waited_for(tmp_path):
    places = _in_directories(tmp_path)
    places[2].note_digests(7, 2)
    note = places[0].unfinished(7) / note_name(2)
    note.write_bytes(note.read_bytes()[:-10])
    places[1].note_digests(7, 1)
    with pytest.raises(TimeoutError, match="process 2"):
        places[0].commit(7, others=PROCESSES[1:])


def test_files_are_told_apart_by_the_folders_of_processes():
    names = [
        "train/ocdbt.process_1/d/a",
        "train/ocdbt.process_10/d/b",
        "ocdbt.process_1/c",
        "train/d/e",
    ]
    assert names_of(1, names) == [names[0], names[2]]
