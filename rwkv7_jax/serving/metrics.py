"""Metrics of the server, in Prometheus' format."""

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

# The label of a request that was rejected because the queue was full.
_REFUSED = "refused"

# Seconds, from a small model on an accelerator to a queue on a CPU.
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts of requests and tokens, and latencies. All methods are thread-safe."""

    def __init__(self, *, decoding: Callable[[], int], waiting: Callable[[], int]):
        """Starts at zero.

        Args:
            decoding: returns the number of requests that have a row.
            waiting: returns the number of requests that wait for a row.
        """
        self._registry = CollectorRegistry()
        # Memory, CPU time and open files, on systems that report them.
        ProcessCollector(registry=self._registry)
        self._gauge("decoding", "requests that have a row of the batch", decoding)
        self._gauge("waiting", "requests in the queue", waiting)
        self._ended = self._counter("requests", "by how they ended", ["ended"])
        # Create each series at 0: `rate` misses the first event of a series that begins at 1.
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
        """Returns a callback for a new request's events that records and forwards them."""
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
        """Counts a request that was rejected because the queue was full."""
        self._ended.labels(_REFUSED).inc()

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
