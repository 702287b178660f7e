"""Messages of a process that waits."""

import contextlib
import sys
import threading
from collections.abc import Iterator

# Seconds until the first message and between messages.
SECONDS = 15.0


@contextlib.contextmanager
def report_wait(what: str) -> Iterator[None]:
    """Prints what the block waits for on stderr, every few seconds until it ends.

    Args:
        what: the end of the sentence, such as "process 0".
    """
    ended = threading.Event()

    def report() -> None:
        waited = SECONDS
        while not ended.wait(SECONDS):
            # None if it was closed before the program started.
            if sys.stderr is not None:
                line = f"waiting for {what} ({waited:.0f} s)"
                print(line, file=sys.stderr, flush=True)
            waited += SECONDS

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
