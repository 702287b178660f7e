"""A run's batches: made ahead from the data, or drawn from the present parameters."""

import numpy as np

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.runs.input_pipeline import DrawnBatches, InputPipeline, PrefetchedBatches


def batch_of(number: int) -> Batch:
    return Batch(tokens=np.full((2, 3), number, np.int32), mask=np.ones((2, 2), np.float32))


def test_batches_of_the_data_come_in_order_on_the_host_and_on_the_device():
    pipeline = InputPipeline(PrefetchedBatches(map(batch_of, range(4)), None))
    for step in range(4):
        placed = pipeline(step, None)
        assert placed is not None
        assert (placed.host.tokens == step).all()
        np.testing.assert_array_equal(placed.host.tokens, np.asarray(placed.device.tokens))
    pipeline.close()
    assert pipeline.waited >= 0


def test_drawn_batches_see_the_present_parameters_and_the_step():
    pipeline = InputPipeline(DrawnBatches(lambda params, step: batch_of(params + step), None))
    placed = pipeline(2, 40)
    assert placed is not None
    assert (placed.host.tokens == 42).all()
    pipeline.close()


def test_a_step_may_have_nothing_to_learn_from():
    pipeline = InputPipeline(DrawnBatches(lambda params, step: None, None))
    assert pipeline(0, None) is None
