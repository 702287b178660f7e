"""A file appears complete or not at all, and whoever may read it stays the same."""

import errno
import os
import stat

import pytest

from rwkv7_jax.atomic_write import append_line, atomic_write


def write(path, content: bytes = b"new"):
    with atomic_write(path) as file:
        file.write(content)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o027, 0o077])
def test_a_new_file_has_the_permissions_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write(tmp_path / "x")
    finally:
        os.umask(before)
    assert mode(tmp_path / "x") == 0o666 & ~mask


@pytest.mark.parametrize("rights", [0o600, 0o640, 0o644, 0o666, 0o755, 0o400])
def test_a_replaced_file_keeps_its_permissions(tmp_path, rights):
    (tmp_path / "x").write_bytes(b"old")
    (tmp_path / "x").chmod(rights)
    write(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert mode(tmp_path / "x") == rights


def test_a_file_system_without_permissions_loses_no_file(tmp_path, monkeypatch):
    def chmod(path, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(type(tmp_path), "chmod", chmod)
    write(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("target", ["x", "./x", "b/../x", "ABSOLUTE"])
@pytest.mark.parametrize("exists", [True, False])
def test_writing_through_a_link_keeps_the_link(tmp_path, target, exists):
    (tmp_path / "b").mkdir()
    if exists:
        (tmp_path / "x").write_bytes(b"old")
    (tmp_path / "link").symlink_to(target.replace("ABSOLUTE", str(tmp_path / "x")))
    (tmp_path / "second").symlink_to("link")
    write(tmp_path / "second")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "second").is_symlink()
    assert (tmp_path / "x").read_bytes() == b"new"
    assert not (tmp_path / "x").is_symlink()


def test_a_link_into_another_folder_writes_its_target(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x").write_bytes(b"old")
    (tmp_path / "link").symlink_to("far/x")
    write(tmp_path / "link")
    assert (tmp_path / "far" / "x").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["far", "link"]
    assert os.listdir(tmp_path / "far") == ["x"]


def test_a_failed_write_leaves_only_the_old_file(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(KeyError), atomic_write(tmp_path / "x") as file:
        file.write(b"half")
        raise KeyError
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("\u8a69" * 85)
    assert len(os.fsencode(path.name)) == 255
    for content in (b"first", b"second"):
        write(path, content)
        assert path.read_bytes() == content
    assert len(os.listdir(tmp_path)) == 1


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the folder of .*/none/x` does not exist"):
        write(tmp_path / "none" / "x")


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (OSError(errno.EFBIG, "File too large"), errno.EFBIG),
        (OSError("131072 requested and 24416 written"), errno.EIO),
    ],
)
def test_a_failed_write_names_the_file(tmp_path, error, number):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "x"):
        raise error
    assert caught.value.errno == number
    assert caught.value.filename == str(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "No such file", "source"), OSError("no archive")]
)
def test_a_read_error_during_a_write_is_not_reworded(tmp_path, error):
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "x"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, "é\n"), ("", "é\n"), ("a\n", "a\né\n"), ('{"st', '{"st\né\n')],
)
def test_an_appended_line_does_not_join_a_truncated_one(tmp_path, before, after):
    path = tmp_path / "log"
    if before is not None:
        path.write_text(before)
    append_line(path, "é")
    assert path.read_bytes().decode() == after


def test_an_interrupt_before_opening_a_file_leaves_none(tmp_path, monkeypatch):
    create = os.open

    def interrupted(*arguments):
        os.close(create(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "file"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []

    def fsync(handle):
        order.append(("flush", os.fstat(handle).st_size))

    def replace(partial, path):
        order.append(("replace", path.name))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path / "x", b"12345")
    assert order == [("flush", 5), ("replace", "x")]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_only_a_disk_that_fails_keeps_the_old_file(tmp_path, monkeypatch, number):
    def fsync(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "x").write_bytes(b"old")
    if number == errno.EIO:
        with pytest.raises(OSError, match="x"):
            write(tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == b"old"
    else:
        write(tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]
