"""Items made ahead of their use by a thread, in order."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

_WAIT = 0.1


class Prefetch:
    """An iterator over what another one gives; up to `ahead` of its items are ready before asked.

    One thread draws, so the order is the iterator's own. Its error, or its end, comes where the
    item would have come.
    """

    def __init__(self, items: Iterator[Any], *, ahead: int = 2):
        """Drawing begins."""
        self._items, self._ready = items, queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="prefetch", daemon=True)
        self._thread.start()

    def _draw(self) -> None:
        try:
            for item in self._items:
                if not self._hand_over((item, None)):
                    return
            self._hand_over((None, StopIteration()))
        except BaseException as error:
            self._hand_over((None, error))

    def _hand_over(self, pair: tuple) -> bool:
        """Whether there was room before the end."""
        while not self._closed.is_set():
            try:
                self._ready.put(pair, timeout=_WAIT)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "Prefetch":
        """Itself."""
        return self

    def __next__(self) -> Any:
        """The next item, as soon as it is there."""
        item, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))
            raise error
        return item

    def close(self) -> None:
        """Drawing has ended."""
        self._closed.set()
        self._thread.join()
