"""Detection of a device call that never returns and so raises no error."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from rwkv7_jax.checks import check_number

# More than the longest tick of a large model on a slow device, which prefills a chunk in every row.
_SECONDS = 120


class Watchdog:
    """A time limit on repeated rounds of work.

    The working thread enters `watch` for each round; any thread may read `is_over`.
    """

    def __init__(
        self, seconds: float = _SECONDS, *, clock: Callable[[], float] = time.monotonic
    ):
        """Creates a watchdog that watches nothing yet.

        Args:
            seconds: the time that a round may take.
            clock: a monotonic clock in seconds.

        Raises:
            TypeError: `seconds` is not a number.
            ValueError: `seconds` is not above zero.
        """
        check_number(seconds, 0, math.inf, "Watchdog: `seconds`", above=True)
        self._seconds = seconds
        self._clock = clock
        # None between two rounds.
        self._began: float | None = None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Watches one round of work."""
        self._began = self._clock()
        try:
            yield
        finally:
            self._began = None

    @property
    def is_over(self) -> bool:
        """Returns whether the current round has exceeded its time."""
        began = self._began
        return began is not None and self._clock() - began > self._seconds
