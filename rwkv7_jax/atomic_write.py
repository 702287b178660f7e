"""Atomic writing: a file appears complete or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` when the block ends, and is deleted when the block fails.

    Raises:
        ValueError: the folder of `path` does not exist.
    """
    if not path.parent.is_dir():
        raise ValueError(f"atomic_write: the folder of `{path}` does not exist.")
    # In the same folder: `os.replace` is atomic only within one file system.
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # Closed before the replacement, so that everything is written by then.
        with os.fdopen(handle, "wb") as file:
            yield file
        # Temporary files are readable by their owner alone; other files by everyone.
        Path(partial).chmod(0o644)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
