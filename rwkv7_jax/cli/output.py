"""Handles errors of standard output: closed pipes and full disks."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def name_output() -> Iterator[None]:
    """Adds the name "standard output" to errors of writing to it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def discard_output() -> None:
    """Discards the buffered output, so that the interpreter's last flush does not fail."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        # A test or another program has replaced the stream.
        return
    # Closing the stream would raise again, so replace its descriptor.
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
