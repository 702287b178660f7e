"""The batches of a run, one a step, on the device before they are needed."""

import abc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.prefetch import Prefetch
from rwkv7_jax.sharding import shard_batch
from rwkv7_jax.test_time.tuning_loop import StateBatchSource


class PlacedBatch(NamedTuple):
    """One batch in two places.

    Attributes:
        host: for the log: NumPy arrays, or `device` where no process has all rows.
        device: the same rows on the run's devices.
    """

    host: Batch
    device: Batch


def _placed(mesh: Mesh | None, batch: Batch, rows: int | None) -> PlacedBatch:
    """Places a batch of all rows, or of this process's own ones among `rows`."""
    # Not by other fields: an anchor may have fewer rows.
    if rows is None or len(batch.tokens) == rows:
        return PlacedBatch(batch, shard_batch(mesh, batch))
    device = shard_batch(mesh, batch, rows=rows)
    return PlacedBatch(device, device)


class BatchSource(abc.ABC):
    """The batches of a run, asked for in the order of its steps.

    Attributes:
        waited: seconds that the loop has waited for batches.
    """

    waited: float = 0.0

    def __call__(self, step: int, params: Callable[[], Any]) -> PlacedBatch | None:
        """Returns the batch of a step, and counts the time that it takes; see `batch`."""
        # Time in here is time in which the device may have nothing to do.
        began = time.monotonic()
        with jax.profiler.TraceAnnotation("wait_for_batch"):
            placed = self.batch(step, params)
        self.waited += time.monotonic() - began
        return placed

    @abc.abstractmethod
    def batch(self, step: int, params: Callable[[], Any]) -> PlacedBatch | None:
        """Returns the batch of a step, or None where the step has nothing to learn from.

        Args:
            step: counted from 0.
            params: returns them as they are before the step; only some sources look at them, and
                to lay them out costs time at every step.
        """

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Numbers about the newest batch, also where it has nothing to learn from."""
        return {}

    @abc.abstractmethod
    def close(self) -> None:
        """Stops making batches."""


class PrefetchedBatches(BatchSource):
    """Batches that depend on the data alone: a thread makes and places them ahead of their use."""

    def __init__(
        self,
        batches: Iterator[Batch],
        mesh: Mesh | None,
        *,
        rows: int,
    ):
        """Starts the thread.

        Args:
            batches: one for each step, in order.
            mesh: the devices that share a batch's rows.
            rows: of the global batch, of which this process may make its `own_rows` only.
        """

        def placed(batch: Batch) -> PlacedBatch:
            return _placed(mesh, batch, rows)

        # Placed by the thread, so that the copy to the device overlaps with the step before.
        self._prefetch = Prefetch(map(placed, batches))

    def batch(self, step: int, params: Callable[[], Any]) -> PlacedBatch:
        """Returns the next batch as soon as it is ready."""
        # The step is not needed: the iterator was opened at the run's first step and is in order.
        return next(self._prefetch)

    def close(self) -> None:
        """Ends the thread."""
        self._prefetch.close()


class DrawnBatches(BatchSource):
    """Batches made from the present parameters, such as completions of the tuned model."""

    def __init__(
        self, source: StateBatchSource, mesh: Mesh | None, *, rows: int | None = None
    ):
        """Keeps what makes them.

        Args:
            source: gives the parameters' batch of a step, counted from 0, or None where the step
                has nothing to learn from.
            mesh: the devices that share a batch's rows.
            rows: of the global batch, where this process only makes its `own_rows`.
        """
        self._source = source
        self._mesh = mesh
        self._rows = rows

    def batch(self, step: int, params: Callable[[], Any]) -> PlacedBatch | None:
        """Makes the batch of a step."""
        batch = self._source.batch(params(), step)
        if batch is None:
            return None
        return _placed(self._mesh, batch, self._rows)

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Numbers about the newest batch."""
        return self._source.metrics

    def close(self) -> None:
        """Does nothing: no batch is made ahead."""
