"""A device that does not answer: its call never returns, so that no error tells of it."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from rwkv7_jax.checks import check_number

# Longer than the longest tick of a large model on a slow device, which reads a chunk in every row.
_SECONDS = 120


class Watchdog:
    """A clock beside work that comes in rounds, of which none may last too long.

    The thread that works says when a round begins and ends; any thread may ask.
    """

    def __init__(
        self, seconds: float = _SECONDS, *, clock: Callable[[], float] = time.monotonic
    ):
        """Starts between two rounds.

        Args:
            seconds: that a round may last.
            clock: of seconds, which never goes back.

        Raises:
            TypeError: `seconds` is no number.
            ValueError: it is not above zero.
        """
        check_number(seconds, 0, math.inf, "Watchdog: `seconds`", above=True)
        self._seconds = seconds
        self._clock = clock
        # None between two rounds.
        self._began: float | None = None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Watches a round."""
        self._began = self._clock()
        try:
            yield
        finally:
            self._began = None

    @property
    def is_over(self) -> bool:
        """Tells whether a round goes on that has lasted too long."""
        began = self._began
        return began is not None and self._clock() - began > self._seconds
