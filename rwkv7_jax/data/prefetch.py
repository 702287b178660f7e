"""Prefetching of an iterator's items in a thread."""

import collections
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rwkv7_jax.checks import check_count, check_instance, prefix_errors


class Prefetch:
    """An iterator that prefetches up to `ahead` items of another iterator.

    A single thread reads the items, so their order is kept. Errors and the end are raised in place
    of the item.
    """

    def __init__(self, items: Iterator[Any], *, ahead: int = 2):
        """Starts the thread.

        Raises:
            TypeError: `items` is not an iterator.
            ValueError: `ahead` is below 1.
        """
        with prefix_errors("Prefetch"):
            check_instance(items, Iterator, "`items`")
            check_count(ahead, 1, "`ahead`")
        self._is_closed = False
        self._items = items
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ready: collections.deque[Future[Any]] = collections.deque()
        for _ in range(ahead):
            self._request()

    def _request(self) -> None:
        self._ready.append(self._thread.submit(next, self._items))

    def __iter__(self) -> "Prefetch":
        """Returns itself."""
        return self

    def __next__(self) -> Any:
        """Returns the next item, as soon as it is ready.

        Raises:
            ValueError: the iterator is closed.
        """
        if self._is_closed:
            raise ValueError("Prefetch: it must not be read after `close`.")
        # An error stays in the queue, so that later calls raise it again.
        item = self._ready[0].result()
        self._ready.popleft()
        self._request()
        return item

    def close(self) -> None:
        """Stops the thread and waits until it has ended."""
        self._is_closed = True
        self._thread.shutdown(cancel_futures=True)
