"""Progress bars for long tasks."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# Length of a bar, and of one on a terminal that is too narrow.
_BAR_CHARACTERS = 24
_LEAST_CHARACTERS = 4

# Seconds between two drawings on a terminal, and at least between two lines elsewhere.
_REDRAW_SECONDS = 0.1
_LINE_SECONDS = 2.0

# Seconds after which a file gets a line although the work has no further tenth done.
_PATIENCE_SECONDS = 60.0


class ProgressBar:
    """A line with a bar, the time left and a text, redrawn in place on a terminal.

    In a file or a pipe it prints plain lines: one per tenth of the work but at most one every few
    seconds, one a minute where a tenth takes longer, and one at the end.

    `rich.progress` is not used: it replaces `sys.stdout` and `sys.stderr` while its bar is shown,
    redraws from a thread, and offers only a bar or silence if the output is not a terminal.
    """

    def __init__(
        self, total: int, label: str, *, file: Any = None, began: float | None = None
    ):
        """Starts the bar at 0 of `total` units.

        Args:
            total: units of work; 0 counts as 1.
            label: the beginning of the line.
            file: the text stream to write to; None for stdout.
            began: the monotonic time at which the work began; None for now.
        """
        # A run resumed at its last step has no work left; avoid a division by 0.
        self._total = max(total, 1)
        self._label = label
        self._file = file or sys.stdout
        self._is_terminal = self._file.isatty()
        self._began = time.monotonic() if began is None else began
        self._drawn = self._began
        self._moved = self._began
        self._tenth = 0
        self._line_is_open = False
        # What the terminal does not show yet.
        self._undrawn = ""
        self._is_lost = False

    def update(self, done: int, text: str = "") -> None:
        """Shows that `done` units are done."""
        _newest[:] = [self]
        self._moved = time.monotonic()
        share = min(done / self._total, 1.0)
        elapsed = self._moved - self._began
        left = elapsed * (1 - share) / share if share else 0.0
        line = f"{self._label} {share:4.0%}  {_clock(left)} left  {text}"
        if self._is_terminal:
            self._redraw(share, line)
        else:
            self._print(share, line)

    def has_moved(self, seconds: float) -> bool:
        """Returns whether the bar was updated within the last seconds."""
        return time.monotonic() - self._moved < seconds

    def _write(self, text: str) -> None:
        """Writes and flushes; a closed pipe or a full disk does not end the work."""
        if self._is_lost:
            return
        try:
            self._file.write(text)
            self._file.flush()
        # ValueError: the stream is closed.
        except (OSError, ValueError):
            self._is_lost = True

    def _redraw(self, share: float, line: str) -> None:
        now = time.monotonic()
        due = now - self._drawn > _REDRAW_SECONDS
        shown = _with_bar(share, line, _columns(self._file))
        # A carriage return before the line, and "erase to the end of the line" after it.
        self._undrawn = f"\r{shown}\x1b[K"
        if self._line_is_open and not due and share < 1.0:
            return
        self._write(self._undrawn)
        self._undrawn = ""
        self._drawn = now
        self._line_is_open = True

    def _print(self, share: float, line: str) -> None:
        now = time.monotonic()
        waited = now - self._drawn
        tenth = int(10 * share)
        due = waited > _LINE_SECONDS or share == 1.0
        if (tenth > self._tenth and due) or waited > _PATIENCE_SECONDS:
            self._write(line.rstrip() + "\n")
            self._drawn = now
            self._tenth = tenth

    def close(self) -> None:
        """Ends the line, with the newest numbers."""
        if self._line_is_open:
            self._write(f"{self._undrawn}\n")
            self._undrawn = ""
            self._line_is_open = False


# The bar that was updated last, if any.
_newest: list[ProgressBar] = []


def end_open_line() -> None:
    """Ends the line of a bar on a terminal, so that other text begins a line of its own."""
    for bar in _newest:
        bar.close()


def a_bar_has_moved(seconds: float) -> bool:
    """Returns whether a bar was updated within the last seconds."""
    return any(bar.has_moved(seconds) for bar in _newest)


@contextlib.contextmanager
def progress(
    label: str, describe: Callable[[int, int], str]
) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that shows how much of a total is done.

    The bar's line ends with the block, even if the block raises: an error gets its own line. A call
    with less than before begins another bar.

    Args:
        label: the beginning of the line.
        describe: called with the number of finished units and their total; returns the end of the
            line.
    """
    bar: ProgressBar | None = None
    before = 0
    began = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal bar, before, began
        # The total is known only when the function is called.
        if bar is None or done < before:
            bar = ProgressBar(total, label, began=began)
        before = done
        began = time.monotonic()
        bar.update(done, describe(done, total))
        # Later output of the block gets its own line too.
        if done == total:
            bar.close()

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


def byte_progress(
    label: str,
) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
    """Yields a function that shows how many bytes of the total are done; see `progress`."""

    def describe(done: int, total: int) -> str:
        return f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB"

    return progress(label, describe)


def count_progress(
    label: str, unit: str
) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
    """Yields a function that shows how many units of a total are done; see `progress`.

    Args:
        label: the beginning of the line.
        unit: the end of the line, such as "questions".
    """

    def describe(done: int, total: int) -> str:
        return f"{done:,} of {total:,} {unit}"

    return progress(label, describe)


def _with_bar(share: float, line: str, columns: int) -> str:
    """Puts a bar before a line; the result does not wrap, and so can be redrawn in place.

    Args:
        share: the share of the bar that is filled.
        line: the line.
        columns: the width of the terminal; 0 if it is unknown.
    """
    width = _BAR_CHARACTERS
    if columns:
        # Without the brackets, the space, and the last column, after which terminals wrap.
        room = columns - len(line) - 4
        width = min(max(room, _LEAST_CHARACTERS), _BAR_CHARACTERS)
    filled = round(width * share)
    shown = f"[{'#' * filled}{'.' * (width - filled)}] {line}"
    return shown[: columns - 1] if columns else shown


def _columns(terminal: Any) -> int:
    """Returns the width of a terminal in characters; 0 if it is unknown."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns
    # ValueError: the stream is closed.
    except (OSError, ValueError):
        return 0


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"
