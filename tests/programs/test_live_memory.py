"""Live arrays during a run: a resumed run holds as much as a new one, in every mode."""

import functools
import gc
import time

import jax
import pytest
from run_programs import train_here
from smallest_runs import MODES, mode_settings

from rwkv7_jax.runs.input_pipeline import BatchSource
from rwkv7_jax.sharding import bytes_on_a_device

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]

# A run that goes on from step 2 has as many unwritten metrics at step 5 as a new one.
RESUMED_STEP = 2
MEASURED_STEP = 5
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


def measure(settings, folder) -> tuple[int, int]:
    """Runs train.py; returns the live bytes of the run and its parameters on the first device."""
    gc.collect()
    # Held until the end: an address that is freed could be taken by an array of the run.
    earlier_arrays = jax.live_arrays()
    earlier = set(live_buffers())
    measured = []
    original = BatchSource.__call__

    def measuring(pipeline, step, params):
        if step == MEASURED_STEP:
            time.sleep(SETTLE_SECONDS)
            gc.collect()
            buffers = live_buffers()
            new = sum(buffers[address] for address in buffers.keys() - earlier)
            measured.append((new, bytes_on_a_device(params())))
        return original(pipeline, step, params)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(BatchSource, "__call__", measuring)
        train_here(settings, folder)
    del earlier_arrays
    return measured[0]


def quiet_settings(mode, base_model, **changes):
    """Makes the settings of a run that saves and evaluates nothing before its end."""
    return mode_settings(
        mode,
        base_model,
        save_every=0,
        evaluation__every=0,
        evaluation__patience=0,
        **changes,
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory, base_model):
    """Measures runs, each once for all tests: `measured(mode, is_continued, **changes)`."""

    @functools.cache
    def run(mode, is_continued, **changes):
        folder = tmp_path_factory.mktemp("run")
        if is_continued:
            short = quiet_settings(mode, base_model, steps=RESUMED_STEP, **changes)
            train_here(short, folder)
        long = quiet_settings(mode, base_model, steps=MEASURED_STEP + 1, **changes)
        return measure(long, folder)

    return run


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_holds_as_many_bytes_as_a_new_one(measured, mode):
    new, _ = measured(mode, False)
    continued, _ = measured(mode, True)
    assert continued == new


@pytest.mark.parametrize("continued", [False, True], ids=["new", "continued"])
@pytest.mark.parametrize(
    "init", [False, True], ids=["new weights", "from a checkpoint"]
)
def test_training_with_adamw_holds_three_times_the_weights(
    base_model, measured, continued, init
):
    changes = {"init": str(base_model)} if init else {}
    held, weights = measured("pretrain", continued, **changes)
    assert 3 * weights <= held <= 3.1 * weights
