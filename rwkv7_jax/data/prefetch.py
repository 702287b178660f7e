"""Prefetching of an iterator's items in a thread."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

# Seconds between checks of a waiting thread for whether it is still needed.
_POLL_SECONDS = 0.1


class Prefetch:
    """An iterator that prefetches up to `ahead` items of another iterator.

    A single thread reads the items, so their order is kept. Errors and the end are raised in place
    of the item.
    """

    def __init__(
        self,
        items: Iterator[Any],
        *,
        ahead: int = 2,
    ):
        """Starts the thread."""
        self._items = items
        # Pairs of an item and None, or of None and the error that ends the iteration.
        self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(
            maxsize=ahead
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run,
            name="prefetch",
            daemon=True,
        )
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item, None):
                    return
            self._put(None, StopIteration())
        # Any error is passed to the thread that consumes the items.
        except BaseException as error:
            self._put(None, error)

    def _put(self, item: Any, error: BaseException | None) -> bool:
        """Adds to the queue, waiting for room; returns false if `close` was called first."""
        while not self._closed.is_set():
            try:
                self._ready.put((item, error), timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "Prefetch":
        """Returns itself."""
        return self

    def __next__(self) -> Any:
        """Returns the next item, as soon as it is ready."""
        item, error = self._ready.get()
        if error is not None:
            # Put back, so that later calls raise it again instead of waiting forever.
            self._ready.put((None, error))
            raise error
        return item

    def close(self) -> None:
        """Stops the thread and waits until it has ended."""
        self._closed.set()
        self._thread.join()
