"""Bytes of live arrays on a device while a run trains."""

import contextlib
import gc
import time

import jax
import pytest

from rwkv7_jax.runs.input_pipeline import BatchSource
from rwkv7_jax.sharding import bytes_on_a_device

# Long enough for the thread that makes batches ahead to fill its queue.
SETTLE_SECONDS = 0.5


def live_buffers() -> dict[int, int]:
    """Returns the size of each live buffer on the first device, by its address."""
    device = jax.local_devices()[0]
    buffers = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            if shard.device == device:
                buffers[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return buffers


@contextlib.contextmanager
def measuring_live_bytes(step: int):
    """Measures what runs in the block hold after so many steps.

    Yields a list; each run adds the live bytes that were not there before the block, and the bytes
    of its parameters, both on the first device.
    """
    gc.collect()
    # Held until the end: an address that is freed could be taken by an array of the run.
    earlier_arrays = jax.live_arrays()
    earlier = set(live_buffers())
    measured = []
    original = BatchSource.__call__

    def measuring(pipeline, steps_done, params):
        if steps_done == step:
            time.sleep(SETTLE_SECONDS)
            gc.collect()
            buffers = live_buffers()
            new = sum(buffers[address] for address in buffers.keys() - earlier)
            measured.append((new, bytes_on_a_device(params())))
        return original(pipeline, steps_done, params)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(BatchSource, "__call__", measuring)
        yield measured
    del earlier_arrays
