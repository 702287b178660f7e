"""The batches of a run, one a step, on the device before they are needed."""

import time
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.prefetch import Prefetch
from rwkv7_jax.data.token_streams import TokenStream
from rwkv7_jax.runs import datasets as job_data
from rwkv7_jax.runs.modes.base import Job
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.sharding import shard_batch


class InputPipeline:
    """Gives each step its batch: of the data, made ahead by a thread, or of the trainables.

    Attributes:
        waited: seconds that the loop has waited for batches.
    """

    def __init__(
        self,
        settings: Settings,
        job: Job,
        stream: TokenStream | None,
        *,
        start_step: int,
        anchor: TokenStream | None = None,
        mesh: Mesh | None = None,
    ):
        """Batches from `start_step` on are being made, each spread over the mesh.

        Args:
            settings: of the run.
            job: its work.
            stream: what it trains on.
            start_step: of the first batch, from 0.
            anchor: general text that it reads beside that.
            mesh: the devices that share a batch's rows.

        Raises:
            ValueError: the data cannot give a batch.
        """
        self._job, self._mesh, self.waited, self._ahead = job, mesh, 0.0, None
        if job.batch is None:
            choices = {"anchor": anchor, "start_step": start_step}
            batches = job_data.batches(settings, stream, job.tokenizer, **choices)
            self._ahead = Prefetch(self._placed(batches, start_step))

    def _placed(self, batches: Iterator[Batch], start_step: int) -> Iterator[tuple]:
        for step, batch in enumerate(batches, start_step):
            prepared = self._job.prepared(batch, step)
            yield prepared, shard_batch(self._mesh, prepared)

    def __call__(self, step: int, trainables: Any) -> tuple[Batch | None, Batch | None]:
        """The batch of a step, counted from 0: on the host, and on the device.

        Both are None where the step has nothing to learn from.
        """
        began = time.monotonic()
        if self._ahead is not None:
            pair = next(self._ahead)
        else:
            batch = self._job.batch(trainables, step)
            pair = batch, None if batch is None else shard_batch(self._mesh, batch)
        self.waited += time.monotonic() - began
        return pair

    def close(self) -> None:
        """No batch is being made."""
        if self._ahead is not None:
            self._ahead.close()
