"""The batches of a run, one per step, on the device before they are needed."""

import abc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.prefetch import Prefetch
from rwkv7_jax.runs.waiting import report_first_call
from rwkv7_jax.sharding import shard_batch
from rwkv7_jax.test_time.tuning_loop import StateBatchSource


class PlacedBatch(NamedTuple):
    """One batch, on the host and on the devices.

    Attributes:
        host: NumPy arrays for the log, or `device` if no process has all rows.
        device: the same rows on the devices of the run.
    """

    host: Batch
    device: Batch


def _placed(mesh: Mesh | None, batch: Batch, rows: int | None) -> PlacedBatch:
    """Places a batch of all rows, or of this process's share of `rows`."""
    # Compare the tokens, because an anchor may have fewer rows.
    if rows is None or len(batch.tokens) == rows:
        return PlacedBatch(batch, shard_batch(mesh, batch))
    device = shard_batch(mesh, batch, rows=rows)
    return PlacedBatch(device, device)


class BatchSource(abc.ABC):
    """The batches of a run, requested in the order of its steps.

    Attributes:
        waited: the seconds that the loop has waited for batches.
    """

    waited: float = 0.0

    def __call__(self, step: int, params: Callable[[], Any]) -> PlacedBatch | None:
        """Returns the batch of a step and adds to `waited`; see `batch`."""
        # The device may be idle during this time.
        began = time.monotonic()
        with jax.profiler.TraceAnnotation("wait_for_batch"):
            placed = self.batch(step, params)
        self.waited += time.monotonic() - began
        return placed

    @abc.abstractmethod
    def batch(self, step: int, params: Callable[[], Any]) -> PlacedBatch | None:
        """Returns the batch of a step; None if the step has nothing to learn from.

        Args:
            step: counted from 0.
            params: returns the parameters before the step. It is a function because only some
                sources need them, and resharding them takes time.
        """

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Metrics of the newest batch, even if it has nothing to learn from."""
        return {}

    @abc.abstractmethod
    def close(self) -> None:
        """Releases the resources of the source."""


class PrefetchedBatches(BatchSource):
    """Batches that depend only on the data; a thread prefetches and places them."""

    def __init__(
        self,
        batches: Iterator[Batch],
        mesh: Mesh | None,
        *,
        rows: int,
    ):
        """Starts the thread.

        Args:
            batches: one batch per step, in order.
            mesh: the devices that share the rows of a batch.
            rows: the rows of the global batch; a batch may hold only this process's `own_rows`.
        """

        def placed(batch: Batch) -> PlacedBatch:
            return _placed(mesh, batch, rows)

        # The thread also places them, so the copy to the device overlaps with the previous step.
        self._prefetch = Prefetch(map(placed, batches))
        # Of a long text the order of the documents comes first.
        self._next = report_first_call(self._prefetch.__next__, "the first batch")

    def batch(self, step: int, params: Callable[[], Any]) -> PlacedBatch:
        """Returns the next batch as soon as it is ready."""
        # `step` is not needed: the iterator starts at the run's first step and is in order.
        return self._next()

    def close(self) -> None:
        """Stops the thread."""
        self._prefetch.close()


class DrawnBatches(BatchSource):
    """Batches drawn with the current parameters, such as completions of the tuned model."""

    def __init__(
        self, source: StateBatchSource, mesh: Mesh | None, *, rows: int | None = None
    ):
        """Stores the arguments.

        Args:
            source: returns the batch of some parameters and a step, counted from 0; None if the
                step has nothing to learn from.
            mesh: the devices that share the rows of a batch.
            rows: the rows of the global batch if this process draws only its `own_rows`.
        """
        self._source = source
        # Later draws take about as long as the first, and the bar moves between them.
        self._draw = report_first_call(source.batch, "the first batch")
        self._mesh = mesh
        self._rows = rows

    def batch(self, step: int, params: Callable[[], Any]) -> PlacedBatch | None:
        """Draws the batch of a step."""
        batch = self._draw(params(), step)
        if batch is None:
            return None
        return _placed(self._mesh, batch, self._rows)

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Metrics of the newest batch."""
        return self._source.metrics

    def close(self) -> None:
        """Does nothing: no batch is prefetched."""
