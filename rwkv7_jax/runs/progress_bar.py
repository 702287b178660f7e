"""How far a long piece of work is."""

import sys
import time


class ProgressBar:
    """A line with a bar, the time left and a text; it rewrites itself on a terminal.

    Elsewhere (a file, a pipe) it prints plain lines: one at most for every tenth of the work and
    every few seconds, and one at the end.
    """

    def __init__(self, total: int, label: str, *, file=None):
        """Begin work of `total` units."""
        self._total, self._label = max(total, 1), label
        self._file = file or sys.stdout
        self._began = time.monotonic()
        self._live = self._file.isatty()
        self._tenth, self._drawn, self._open = 0, self._began, False

    def update(self, done: int, text: str = "") -> None:
        """Show that `done` units are done."""
        share = min(done / self._total, 1.0)
        now = time.monotonic()
        left = (now - self._began) * (1 - share) / share if share else 0.0
        line = f"{self._label} {share:4.0%}  {_clock(left)} left  {text}"
        if self._live:
            if not self._open or now - self._drawn > 0.1 or share == 1.0:
                filled = round(24 * share)
                bar = "#" * filled + "." * (24 - filled)
                self._file.write(f"\r[{bar}] {line}\x1b[K")
                self._drawn, self._open = now, True
        elif int(10 * share) > self._tenth and (now - self._drawn > 2 or share == 1.0):
            self._tenth, self._drawn = int(10 * share), now
            self._file.write(line.rstrip() + "\n")
        self._file.flush()

    def close(self) -> None:
        """End the line."""
        if self._open:
            self._file.write("\n")
            self._file.flush()
            self._open = False


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
