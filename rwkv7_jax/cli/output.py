"""Output to a pipe that its reader has closed, or to a file on a full disk."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def name_output() -> Iterator[None]:
    """Names standard output in the errors of writing to it, as files are named in theirs."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def discard_output() -> None:
    """Discards the buffered output, so that the interpreter's last flush is quiet."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        # A test or another program has replaced the stream.
        return
    # Closing the stream would raise once more, so its descriptor is replaced.
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
