"""Writes files atomically, and appends lines to logs."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from rwkv7_jax.local_paths import is_special

# Characters of a file's name in that of its temporary file, which must not be too long either. A
# character has up to four bytes, and a name up to 255.
_SHOWN = 60


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces `path` when the block ends without an error.

    Raises:
        ValueError: the folder of `path` does not exist, or `path` is a device or a pipe.
        OSError: the file cannot be written, or only in part; the error names `path`.
    """
    if not path.parent.is_dir():
        raise ValueError(f"atomic_write: the folder of `{path}` does not exist.")
    # The target of a link is replaced, not the link.
    path = Path(os.path.realpath(path))
    # With root's permissions, a file could replace /dev/null for all programs.
    if is_special(path):
        raise ValueError(
            f"atomic_write: `{path}` must be a file; it is a device or a pipe."
        )
    # In the same folder, because `os.replace` is atomic only within a file system.
    partial = path.parent / f".{path.name[:_SHOWN]}.{secrets.token_hex(4)}"
    try:
        with _create(partial, path) as file:
            yield file
            flush_to_disk(file)
        if path.exists():
            # Keep the permissions of the existing file, unless its file system has none.
            with contextlib.suppress(OSError):
                partial.chmod(path.stat().st_mode & 0o777)
        os.replace(partial, path)
    except OSError as error:
        number = error.errno
        if number is None and str(error).endswith(" written"):
            # `tofile` of NumPy reports how much it wrote, without a reason.
            number = errno.EIO
        # An error from reading another file names that file or has no number.
        if error.filename is not None or number is None:
            raise
        raise OSError(number, error.strerror or str(error), str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(file: IO) -> None:
    """Waits until the disk has everything written to a file, as a power failure requires.

    Without it, a file may have its new name before its content.

    Raises:
        OSError: the disk is full or fails.
    """
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        # Some network file systems have no such call.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file, on a new line even if the last one is incomplete.

    Args:
        path: path of the file; created if missing.
        line: the line, without a line feed.

    Raises:
        OSError: the line cannot be written, or only in part.
    """
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                # A full disk may truncate a line; appending to it would lose this one too.
                file.write(b"\n")
        file.write(f"{line}\n".encode())


def _create(partial: Path, path: Path) -> BinaryIO:
    """Opens a new file; errors name the file that it replaces."""
    try:
        # `os.open` applies the umask; files of `tempfile` are readable only by their owner.
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        # The name of the temporary file would not help a user.
        raise OSError(error.errno, error.strerror, str(path)) from None
    return os.fdopen(handle, "wb")
