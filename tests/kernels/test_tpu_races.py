"""Pallas's race detector on the TPU kernels, and on a kernel that races."""

import jax
import jax.numpy as jnp
import pytest
import wkv_reference
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from tolerances import WKV, assert_close

from pallas_kernels.cases import Case, make_inputs
from pallas_kernels.reference import wkv7_reference
from pallas_kernels.tpu import pallas_calls as tpu
from pallas_kernels.tpu import token_step

pytestmark = pytest.mark.slow
DETECTING = pltpu.InterpretParams(detect_races=True)


def racing_kernel(source, target, buffer, semaphore):
    """Reads a buffer while a copy into it may still be running."""
    copy = pltpu.make_async_copy(source, buffer, semaphore)
    copy.start()
    target[...] = buffer[...]
    copy.wait()


def test_a_race_in_a_kernel_is_detected(capfd):
    """JAX up to 0.10 prints a line; later versions raise an error."""
    x = jnp.ones((8, 128))
    raised = ""
    run = pl.pallas_call(
        racing_kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=DETECTING,
    )
    try:
        run(x).block_until_ready()
    except jax.errors.JaxRuntimeError as error:
        raised = str(error)
    assert "RACE DETECTED" in raised + "".join(capfd.readouterr())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_do_not_race(capfd, dtype):
    """Runs two chunks and two groups of tiles through both passes."""
    case = Case(2, 90, 4)
    inputs, state = make_inputs(case, dtype)
    dy = jnp.sin(inputs[3])
    dend = jnp.cos(state)
    y, end, starts = tpu.forward_saving(inputs, state, interpret=DETECTING)
    grads, dstate = tpu.backward(inputs, starts, dy, dend, interpret=DETECTING)
    true_y, true_end, true_grads = wkv_reference.both(inputs, state, dy, dend)
    assert_close(y, true_y, WKV[dtype]["y"], "y")
    assert_close(end, true_end, WKV[dtype]["state"], "end")
    for left, right in zip((*grads, dstate), true_grads, strict=True):
        assert_close(left, right, WKV[dtype]["gradient"])
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_the_kernel_for_single_tokens_does_not_race(capfd):
    """Runs two steps of rows, of two steps of tiles each."""
    # Whole steps: the interpreter pads a part of one, and the aliased result would not fit.
    inputs, state = make_inputs(Case(16, 1, 8))
    tiled = token_step.tile(state)
    y, tiled = token_step.run_kernel(inputs, tiled, interpret=DETECTING)
    true_y, true_end = wkv7_reference(inputs, state)
    assert_close(y, true_y, WKV["float32"]["y"], "y")
    assert_close(token_step.untile(tiled), true_end, WKV["float32"]["state"], "end")
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
