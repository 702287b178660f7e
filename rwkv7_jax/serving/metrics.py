"""What a server's operator watches, in Prometheus' format."""

import time
from collections.abc import Callable, Sequence
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from rwkv7_jax.serving.requests import Answer, Ending, Piece

_Receiver = Callable[[Piece | Answer], None]

# How a request ends that found the queue full.
_REFUSED = "refused"

# Seconds; a small model on an accelerator is at the one end, a queue at a CPU at the other.
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts of requests and tokens, and times; any thread may add to them."""

    def __init__(self, *, decoding: Callable[[], int], waiting: Callable[[], int]):
        """Starts at zero.

        Args:
            decoding: counts the requests that have a row.
            waiting: counts those that wait for one.
        """
        self._registry = CollectorRegistry()
        # Memory, processor time and open files, where the system tells.
        ProcessCollector(registry=self._registry)
        self._gauge("decoding", "requests that have a row of the batch", decoding)
        self._gauge("waiting", "requests in the queue", waiting)
        self._ended = self._counter("requests", "by how they ended", ["ended"])
        # From the beginning: of a series that begins at 1, a rate misses the first failure.
        for ending in (*get_args(Ending), _REFUSED):
            self._ended.labels(ending)
        self._prompt = self._counter("prompt_tokens", "of prompts")
        self._cached = self._counter("cached_tokens", "of prompts, not read again")
        self._made = self._counter("answer_tokens", "of answers")
        self._first = self._histogram("first_text", "to the first text of an answer")
        self._whole = self._histogram("answer", "to the end of an answer")

    def _gauge(self, name: str, meaning: str, count: Callable[[], int]) -> None:
        gauge = Gauge(f"rwkv7_requests_{name}", meaning, registry=self._registry)
        gauge.set_function(count)

    def _counter(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"rwkv7_{name}", meaning, labels, registry=self._registry)

    def _histogram(self, name: str, meaning: str) -> Histogram:
        return Histogram(
            f"rwkv7_{name}_seconds",
            f"from a request {meaning}",
            buckets=_BUCKETS,
            registry=self._registry,
        )

    def watch(self, receive: _Receiver) -> _Receiver:
        """Returns a receiver of a new request's events that notes them, and passes them on."""
        start = time.monotonic()
        begun = False

        def note(event: Piece | Answer) -> None:
            nonlocal begun
            seconds = time.monotonic() - start
            if isinstance(event, Answer):
                self._end(event, seconds)
            elif not begun:
                begun = True
                self._first.observe(seconds)
            receive(event)

        return note

    def _end(self, answer: Answer, seconds: float) -> None:
        self._ended.labels(answer.ended).inc()
        self._prompt.inc(answer.prompt_tokens)
        self._cached.inc(answer.cached_tokens)
        self._made.inc(len(answer.tokens))
        self._whole.observe(seconds)

    def refuse(self) -> None:
        """Notes a request that found the queue full."""
        self._ended.labels(_REFUSED).inc()

    def text(self) -> bytes:
        """Returns all of them in Prometheus' text format."""
        return generate_latest(self._registry)
