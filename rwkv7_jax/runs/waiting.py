"""Messages of a process that waits."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, ParamSpec, TypeVar

from rwkv7_jax.checks import escape_controls
from rwkv7_jax.runs.monitoring.progress_bar import (
    a_bar_has_moved,
    end_open_line,
)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# Seconds until the first message. They double from message to message, up to a minute.
SECONDS = 15.0
_MOST_SECONDS = 60.0


class _Wait(NamedTuple):
    """The end of the sentence for a wait, and the monotonic time of its start."""

    what: str
    began: float


# The waits that have not ended, the outermost first.
_waits: list[_Wait] = []


@contextlib.contextmanager
def report_wait(what: str) -> Iterator[None]:
    """Prints what the block waits for on stderr, again and again until it ends.

    Nothing is printed while a progress bar moves. Inside of another wait no thread is started: the
    messages of the outermost one name the innermost, which says more.

    Args:
        what: the end of the sentence, such as "process 0".
    """
    wait = _Wait(what, time.monotonic())
    with contextlib.ExitStack() as stack:
        _waits.append(wait)
        stack.callback(_waits.remove, wait)
        if len(_waits) == 1:
            stack.enter_context(_messages())
        yield


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    """Prints a message from time to time until the block ends."""
    ended = threading.Event()

    def report() -> None:
        pause = SECONDS
        while not ended.wait(pause):
            # A bar that moves says more.
            if not a_bar_has_moved(pause):
                _print_message(_waits[-1])
            pause = min(2 * pause, _MOST_SECONDS)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _print_message(wait: _Wait) -> None:
    # None if it was closed before the program started.
    if sys.stderr is None:
        return
    end_open_line()
    waited = time.monotonic() - wait.began
    line = f"waiting for {escape_controls(wait.what)} ({waited:.0f} s)"
    # A closed pipe or a full disk does not end the work. ValueError: the stream is closed.
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


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
