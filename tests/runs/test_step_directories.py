"""Manifests of step directories."""

import errno
import os
import stat

import pytest

from rwkv7_jax.runs.resume import step_directories


def test_a_manifest_detects_changed_and_extra_files(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "in/b"):
        (tmp_path / name).write_text(name)
    step_directories.write_manifest(tmp_path)
    assert step_directories.verify_manifest(tmp_path) == []
    (tmp_path / "in/b").write_text("c")
    (tmp_path / "further").write_text("")
    assert step_directories.verify_manifest(tmp_path) == ["in/b", "further"]


def fail_to_flush(monkeypatch, is_kind, number):
    """Makes `os.fsync` fail for paths of a kind."""
    flush = os.fsync

    def fsync(handle):
        if is_kind(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_flushes_no_folders_keeps_steps(
    tmp_path, monkeypatch, number
):
    fail_to_flush(monkeypatch, stat.S_ISDIR, number)
    (tmp_path / "a").write_text("a")
    step_directories.write_manifest(tmp_path)
    assert step_directories.verify_manifest(tmp_path) == []


@pytest.mark.parametrize(
    ("is_kind", "number"),
    [(stat.S_ISDIR, errno.EIO), (stat.S_ISREG, errno.EINVAL)],
)
def test_an_unflushed_step_is_an_error(tmp_path, monkeypatch, is_kind, number):
    fail_to_flush(monkeypatch, is_kind, number)
    (tmp_path / "a").write_text("a")
    with pytest.raises(OSError, match=os.strerror(number)):
        step_directories.write_manifest(tmp_path)


def test_the_name_of_a_new_step_is_flushed(tmp_path, monkeypatch):
    steps = step_directories.StepDirectories(tmp_path)
    written = steps.unfinished(3)
    written.mkdir(parents=True)
    (written / "a").write_text("a")
    flushed = []

    def fsync(path):
        flushed.append((path, steps.path(3).exists()))

    monkeypatch.setattr(step_directories, "_fsync", fsync)
    steps.commit(3)
    assert flushed[-1] == (tmp_path, True)
    assert (written, False) in flushed
