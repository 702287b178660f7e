"""Messages of a process that waits."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

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


def report_first_call(
    call: Callable[_Arguments, _Result], what: str
) -> Callable[_Arguments, _Result]:
    """Wraps a function that compiles when it is first called; `report_wait` covers that call.

    Args:
        call: the function.
        what: the end of the sentence.
    """
    waits = iter([report_wait(what)])

    def reporting(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        with next(waits, contextlib.nullcontext()):
            return call(*arguments, **options)

    return reporting
