"""Long logs in a store: what is new of them is copied, and they come back byte for byte."""

import json

import pytest

from rwkv7_jax.atomic_write import append_line, atomic_write
from rwkv7_jax.runs.resume import backup, stored_logs
from rwkv7_jax.runs.resume.object_store import ObjectStore

LINE = json.dumps({"step": 1, "loss_nats": 1.0, "text": "x" * 60})


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch):
    monkeypatch.setattr(stored_logs, "PART_BYTES", 1000)
    monkeypatch.setattr(backup, "HEARTBEAT_SECONDS", 0.1)


class CountingStore(ObjectStore):
    """A store that counts the bytes which are written to it."""

    written = 0

    def put(self, key, value):
        self.written += len(value or b"")
        super().put(key, value)

    def upload(self, files):
        self.written += sum(path.stat().st_size for path in files.values())
        super().upload(files)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    store = CountingStore(f"file://{tmp_path / 'bucket'}")
    copy = backup.Backup(store, tmp_path / "run")
    yield tmp_path / "run", copy, store
    copy.release()


def _append(path, lines):
    for _ in range(lines):
        append_line(path, LINE)


def _fetched(tmp_path, name="metrics.jsonl"):
    """What another machine gets."""
    store = ObjectStore(f"file://{tmp_path / 'bucket'}")
    store_keys = [key for key in store.list() if not key.startswith("log_parts/")]
    store.download({key: tmp_path / "other" / key for key in store_keys})
    (tmp_path / "other").mkdir(exist_ok=True)
    stored_logs.StoredLogs(store, lambda: None).download(tmp_path / "other")
    return (tmp_path / "other" / name).read_bytes()


def test_a_log_of_any_length_costs_a_copy_what_is_new_of_it(run, tmp_path):
    folder, copy, store = run
    log = folder / "metrics.jsonl"
    costs = []
    for _ in range(40):
        _append(log, 5)
        before = store.written
        copy.copy_files()
        costs.append(store.written - before)
        assert _fetched(tmp_path) == log.read_bytes()
    assert log.stat().st_size > 15_000
    # Two parts, and the index of 20 parts.
    assert max(costs) < 2 * 1000 + 20 * 80
    parts = len(list((tmp_path / "bucket" / "log_parts").iterdir())) - 1
    assert parts == -(-log.stat().st_size // 1000)


def test_a_log_that_grows_long_is_no_longer_there_whole(run, tmp_path):
    folder, copy, _ = run
    log = folder / "metrics.jsonl"
    _append(log, 2)
    copy.copy_files()
    assert (tmp_path / "bucket" / "metrics.jsonl").read_bytes() == log.read_bytes()
    _append(log, 20)
    copy.copy_files()
    assert not (tmp_path / "bucket" / "metrics.jsonl").exists()
    assert _fetched(tmp_path) == log.read_bytes()


@pytest.mark.parametrize("lines", [2, 13, 40])
def test_a_log_that_was_replaced_comes_back_as_it_is_now(run, tmp_path, lines):
    folder, copy, _ = run
    log = folder / "metrics.csv"
    _append(log, 30)
    copy.copy_files()
    with atomic_write(log) as file:
        file.write(f"{LINE} changed\n".encode() * lines)
    copy.copy_files()
    assert _fetched(tmp_path, "metrics.csv") == log.read_bytes()
    parts = len(list((tmp_path / "bucket" / "log_parts").iterdir())) - 1
    size = log.stat().st_size
    assert parts == len(set(_parts(log.read_bytes()))) * (size > 1000)


def _parts(content):
    return [content[first : first + 1000] for first in range(0, len(content), 1000)]


def test_a_new_process_copies_nothing_that_the_store_has(run, tmp_path):
    folder, copy, store = run
    _append(folder / "metrics.jsonl", 100)
    copy.copy_files()
    copy.release()
    again = backup.Backup(store, folder)
    before = store.written
    again.copy_files()
    again.release()
    assert store.written == before


def test_parts_that_an_ended_process_did_not_name_are_deleted(run, tmp_path):
    folder, copy, store = run
    store.put("log_parts/0123", b"stray")
    _append(folder / "metrics.jsonl", 30)
    copy.copy_files()
    assert not (tmp_path / "bucket" / "log_parts" / "0123").exists()
    assert _fetched(tmp_path) == (folder / "metrics.jsonl").read_bytes()


def test_a_damaged_part_and_a_damaged_index_are_warnings(run, tmp_path, capsys):
    folder, copy, store = run
    log = folder / "metrics.jsonl"
    _append(log, 30)
    copy.copy_files()
    parts = tmp_path / "bucket" / "log_parts"
    first = next(
        path for path in parts.iterdir() if path.read_bytes() == log.read_bytes()[:1000]
    )
    first.write_bytes(b"damaged")
    assert _fetched(tmp_path) == log.read_bytes()[1000:]
    assert "1 of 4 parts of metrics.jsonl in file://" in capsys.readouterr().err
    (parts / "index.json").write_bytes(b"{}")
    stored_logs.StoredLogs(store, lambda: None).download(tmp_path / "other")
    assert "log_parts/index.json in file://" in capsys.readouterr().err


def test_a_log_that_is_appended_to_while_it_is_copied_comes_back_to_a_point(
    run, tmp_path, monkeypatch
):
    folder, copy, _ = run
    log = folder / "metrics.jsonl"
    _append(log, 30)
    before = log.read_bytes()
    put = CountingStore.put

    def appending(self, key, value):
        _append(log, 1)
        put(self, key, value)

    with monkeypatch.context() as patched:
        patched.setattr(CountingStore, "put", appending)
        copy.copy_files()
    assert _fetched(tmp_path) == before
    copy.copy_files()
    assert _fetched(tmp_path) == log.read_bytes()


def test_a_displaced_process_replaces_no_index(run, tmp_path):
    folder, copy, _ = run
    _append(folder / "metrics.jsonl", 30)
    copy.copy_files()
    index = (tmp_path / "bucket" / "log_parts" / "index.json").read_bytes()
    _append(folder / "metrics.jsonl", 30)
    copy._logs._check = lambda: (_ for _ in ()).throw(OSError("displaced"))
    with pytest.raises(OSError, match="displaced"):
        copy.copy_files()
    assert (tmp_path / "bucket" / "log_parts" / "index.json").read_bytes() == index
    assert _fetched(tmp_path) == _until(folder / "metrics.jsonl", 30)


def _until(path, lines):
    return b"".join(path.read_bytes().splitlines(keepends=True)[:lines])
