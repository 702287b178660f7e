"""The Triton kernels, in Triton's interpreter, against the float64 definition."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wkv_reference
from child_programs import run_child
from run_programs import ROOT
from tolerances import WKV, assert_close

from pallas_kernels.cases import Case, make_inputs

pytestmark = pytest.mark.slow
NAMES = ("y", "state", "r", "log_w", "k", "v", "a", "b", "start state")


def _data(case, dtype):
    """Returns inputs, start state, and gradients of y and of the last state."""
    inputs, state = make_inputs(case, dtype)
    dend = jax.random.normal(jax.random.key(1), state.shape)
    # A dy that resembles v: the decay's gradient then cancels, and rounding shows most.
    return inputs, state, jnp.sin(inputs.v), dend


def _write(path, data):
    """Writes the data to a file that the other process reads."""
    inputs, state, dy, dend = data
    arrays = {f"inputs.{i}": x for i, x in enumerate(inputs)}
    arrays |= {"state": state, "dy": dy, "dend": dend}
    np.savez(path, **{name: np.asarray(x, np.float32) for name, x in arrays.items()})


# Case, chunk, capability of the device.
RUNS = [
    (Case(2, 37, 2, 32, 64, "real"), 16, 90),
    (Case(1, 70, 2, 64, 32, "fast"), 32, 90),
    (Case(1, 45, 1, 64, 64, "slow"), 16, 80),
    (Case(1, 96, 1, 64, 64, "repeated"), 32, 90),
    (Case(1, 5, 3, 16, 128, "real"), 32, 80),
    (Case(1, 530, 1, 32, 16, "slow"), 16, 90),  # in four segments
]
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Returns the folder with the results of every run, all from one process: it starts slowly."""
    if not all(map(importlib.util.find_spec, ("torch", "triton"))):
        pytest.skip("the oracle extra is not installed")
    folder = tmp_path_factory.mktemp("runs")
    words = []
    for dtype in DTYPES:
        for i, (case, chunk, capability) in enumerate(RUNS):
            given, found = (
                folder / f"{side}-{i}-{dtype}.npz" for side in ("in", "out")
            )
            _write(given, _data(case, dtype))
            words += [given, found, str(chunk), dtype, str(capability)]
    run_child("triton_process", *words, PYTHONPATH=str(ROOT))
    return folder


@pytest.mark.parametrize("run", range(len(RUNS)), ids=[case.mode for case, *_ in RUNS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_float64_definition(results, run, dtype):
    case = RUNS[run][0]
    data = _data(RUNS[run][0], dtype)
    with np.load(results / f"out-{run}-{dtype}.npz") as out:
        found = [out[name] for name in out.files]
    y, end, grads = wkv_reference.both(*data)
    bars = WKV[dtype]
    for name, actual, expected in zip(NAMES, found, (y, end, *grads), strict=True):
        bar = bars.get(f"gradient of {name}, {case.mode} keys", bars["gradient"])
        assert_close(actual, expected, bars.get(name, bar), name)
