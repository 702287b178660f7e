"""Documents from files, folders and built-in corpora."""

import errno
import os

import pytest

from rwkv7_jax.data.builtin_corpora import BUILT_IN
from rwkv7_jax.data.jsonl import ReadStats
from rwkv7_jax.data.readers import documents, size_of


def texts(source, **choices):
    return [document.text() for document in documents(source, **choices)]


def test_a_folder_is_read_in_path_order_with_one_document_per_text_file(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_bytes(b"one two")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n')
    stats = ReadStats()
    assert texts(tmp_path, stats=stats) == [b"good", b"one two"]
    assert stats == ReadStats(bytes=size_of(tmp_path))


def test_a_source_that_does_not_exist_is_named():
    with pytest.raises(
        ValueError, match="`nowhere` must be a file, a folder or one of stdlib"
    ):
        texts("nowhere")
    with pytest.raises(
        ValueError, match="`on_bad` must be one of error, skip; got 'ignore'"
    ):
        texts("stdlib", on_bad="ignore")


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_corpora_have_a_fixed_order(name):
    try:
        first = texts(name)
    except ValueError as error:
        pytest.skip(str(error))
    assert len(first) > 20 and all(first)
    assert first == texts(name)


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    """Root may read every folder, so the error is a made one."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "a.txt").write_bytes(b"a")
    (tmp_path / "b.txt").write_bytes(b"b")
    scan = os.scandir

    def scan_open(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_open)
    with pytest.raises(PermissionError, match="closed"):
        texts(tmp_path)


def test_a_link_to_another_file_of_the_folder_is_not_read(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "blob").write_text("c")
    (folder / "b.txt").write_text("b")
    (folder / "a-latest.txt").symlink_to("b.txt")
    # Equal files may be links to one store.
    (folder / "c.txt").symlink_to(tmp_path / "blob")
    (folder / "d.txt").symlink_to(tmp_path / "blob")
    stats = ReadStats()
    assert texts(folder, stats=stats) == [b"b", b"c", b"c"]
    assert stats.passed_over == 1
