"""The batches of a run: prefetched from data, or sampled with the current parameters."""

import threading
import time

import jax
import numpy as np

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.runs.input_pipeline import DrawnBatches, PrefetchedBatches
from rwkv7_jax.sharding import make_mesh
from rwkv7_jax.test_time.tuning_loop import StateBatchSource


def numbered(step: int) -> Batch:
    """Makes a batch of two rows that contains its step."""
    tokens = np.full((2, 5), step, np.int32)
    return Batch(tokens=tokens, mask=np.ones((2, 4), np.float32))


def not_needed():
    """Stands for parameters of a batch that depends on the data alone."""
    raise AssertionError("no parameters are needed")


def test_batches_of_the_data_come_in_order_on_the_host_and_on_the_devices():
    mesh = make_mesh("auto", 2)
    feed = PrefetchedBatches(map(numbered, range(7, 10)), mesh, rows=2)
    for step in range(7, 10):
        placed = feed(step, not_needed)
        assert isinstance(placed.host.tokens, np.ndarray)
        assert (placed.host.tokens == step).all()
        assert isinstance(placed.device.tokens, jax.Array)
        np.testing.assert_array_equal(placed.device.tokens, placed.host.tokens)
        assert len(placed.device.tokens.sharding.device_set) == mesh.size
    feed.close()


def test_a_batch_with_all_rows_stays_on_the_host_for_the_log():
    mesh = make_mesh("auto", 2)
    short = numbered(0).replace(anchor=np.zeros((1, 5), np.int32))
    source = PrefetchedBatches(iter([short]), mesh, rows=2)
    placed = source.batch(0, not_needed)
    source.close()
    assert placed.host is short
    np.testing.assert_array_equal(placed.device.tokens, short.tokens)
    assert placed.device.anchor.shape == (1, 5)


class Drawn(StateBatchSource):
    """Batches of numbered rows; the first step has nothing to learn from."""

    def __init__(self, seconds: float = 0.0):
        super().__init__()
        self.seen = []
        self.seconds = seconds

    def batch(self, state, step):
        time.sleep(self.seconds)
        self.seen.append((state, step))
        self.metrics = {"reward": step / 2}
        return numbered(step) if step else None


def test_a_sampled_batch_depends_on_the_parameters_of_its_step():
    source = Drawn()
    feed = DrawnBatches(source, None)
    assert feed(0, lambda: "before") is None
    assert feed.metrics == {"reward": 0.0}
    assert (feed(1, lambda: "after").host.tokens == 1).all()
    assert feed.metrics == {"reward": 0.5}
    assert source.seen == [("before", 0), ("after", 1)]
    feed.close()


def test_the_time_spent_waiting_for_batches_is_counted():
    feed = DrawnBatches(Drawn(seconds=0.05), None)
    for step in range(2):
        feed(step, lambda: None)
    assert feed.waited >= 0.1


def test_closing_ends_the_thread_that_makes_batches():
    others = set(threading.enumerate())
    feed = PrefetchedBatches(iter(numbered(0) for _ in range(100)), None, rows=2)
    feed(0, not_needed)
    feed.close()
    started = set(threading.enumerate()) - others
    assert not [thread for thread in started if thread.name.startswith("prefetch")]
