"""The Triton kernels against the float64 definition, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wkv_oracle
from tolerances import WKV, assert_close

from pallas_kernels.cases import Case, make_inputs

for package in ("torch", "triton"):
    pytest.importorskip(package, reason="the oracle extra is not installed")

pytestmark = pytest.mark.slow
NAMES = ("y", "state", "r", "log_w", "k", "v", "a", "b", "start state")
CHILD = Path(__file__).with_name("triton_child.py")


def _data(case, dtype):
    """Inputs, start state, and gradients from y and the end; dy resembles v, which is hardest."""
    inputs, state = make_inputs(case, dtype)
    dend = jax.random.normal(jax.random.key(1), state.shape)
    return inputs, state, jnp.sin(inputs[3]), dend


def _run(folder, data, *settings):
    """What the child makes of the data."""
    inputs, state, dy, dend = data
    arrays = {f"inputs.{i}": x for i, x in enumerate(inputs)}
    arrays |= {"state": state, "dy": dy, "dend": dend}
    arrays = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    np.savez(folder / "in.npz", **arrays)
    done = subprocess.run(
        [sys.executable, CHILD, folder / "in.npz", folder / "out.npz", *map(str, settings)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(CHILD.parents[1])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(folder / "out.npz") as out:
        return [out[name] for name in out.files]


@pytest.mark.parametrize(
    ("case", "chunk", "capability"),
    [
        (Case(2, 37, 2, 32, 64, "real"), 16, 90),
        (Case(1, 70, 2, 64, 32, "fast"), 32, 90),
        (Case(1, 45, 1, 64, 64, "slow"), 16, 80),
        (Case(1, 96, 1, 64, 64, "repeated"), 32, 90),
        (Case(1, 5, 3, 16, 128, "real"), 32, 80),
        (Case(1, 300, 1, 32, 16, "slow"), 16, 90),  # in two segments
    ],
    ids=lambda x: x.mode if isinstance(x, Case) else None,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_float64_definition(tmp_path, case, chunk, capability, dtype):
    data = _data(case, dtype)
    found = _run(tmp_path, data, chunk, dtype, capability)
    y, end, grads = wkv_oracle.both(*data)
    bars = WKV[dtype]
    for name, actual, expected in zip(NAMES, found, (y, end, *grads), strict=True):
        bar = bars.get(f"gradient of {name}, {case.mode} keys", bars["gradient"])
        assert_close(actual, expected, bars.get(name, bar), name)
