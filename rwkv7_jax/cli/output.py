"""Output to a pipe that its reader has closed."""

import os
import sys


def discard_output() -> None:
    """Discards the buffered output, so that the interpreter's last flush is quiet."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        # A test or another program has replaced the stream.
        return
    # Closing the stream would raise once more, so its descriptor is replaced.
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
