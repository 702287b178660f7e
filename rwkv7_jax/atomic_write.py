"""Writes files completely or not at all, and appends lines to logs."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv7_jax.local_paths import is_special


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` when the block ends, and is deleted when the block fails.

    Raises:
        ValueError: the folder of `path` does not exist, or a device or a pipe is at `path`.
        OSError: nothing can be written there, or not all of it; it names `path`.
    """
    if not path.parent.is_dir():
        raise ValueError(f"atomic_write: the folder of `{path}` does not exist.")
    # A link stays a link: the file that it leads to is replaced.
    path = Path(os.path.realpath(path))
    # A user who may do everything would put a file in the place of /dev/null, for all programs.
    if is_special(path):
        raise ValueError(
            f"atomic_write: `{path}` must be a file; a device or a pipe is there."
        )
    # In the same folder: `os.replace` is atomic only within one file system.
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        # Closed before the replacement, so that everything is written by then.
        with _create(partial, path) as file:
            yield file
        if path.exists():
            # Who may read the file stays as it was.
            partial.chmod(path.stat().st_mode & 0o777)
        os.replace(partial, path)
    except OSError as error:
        number = error.errno
        if number is None and str(error).endswith(" written"):
            # NumPy's `tofile` says how much was written, and not why no more.
            number = errno.EIO
        # An error of something that the block reads names its own file or has no number.
        if error.filename is not None or number is None:
            raise
        raise OSError(number, error.strerror or str(error), str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file, on a line of its own even where an earlier one was cut off.

    Args:
        path: of the file; it is made where it does not exist.
        line: without its end.

    Raises:
        OSError: it cannot be written, or only a part of it.
    """
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                # A full disk cut the last one: glued to its rest, this one would be lost as well.
                file.write(b"\n")
        file.write(f"{line}\n".encode())


def _create(partial: Path, path: Path) -> BinaryIO:
    """Opens a new file; an error names the one that it is to replace."""
    try:
        # Not `tempfile`, whose files are readable by their owner alone: the system applies the
        # umask.
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        # The hidden file's name would tell a user nothing.
        raise OSError(error.errno, error.strerror, str(path)) from None
    return os.fdopen(handle, "wb")
