"""New weights, tuning and generation under JAX's global switches, in processes of their own."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "support" / "global_switches.py"

# By the name of a test. Those that only raise are set together, in one process: a program that
# none of them ends is one that each leaves alone.
RAISING = {
    "NaN raises": {"JAX_DEBUG_NANS": "1"},
    "infinities raise": {"JAX_DEBUG_INFS": "1"},
    "rank promotion raises": {"JAX_NUMPY_RANK_PROMOTION": "raise"},
    "promotion is strict": {"JAX_NUMPY_DTYPE_PROMOTION": "strict"},
    "leaks raise": {"JAX_CHECK_TRACER_LEAKS": "1"},
}
OTHERS = {
    "float64 allowed": {"JAX_ENABLE_X64": "1"},
    "full matmul precision": {"JAX_DEFAULT_MATMUL_PRECISION": "highest"},
    "nothing is compiled": {"JAX_DISABLE_JIT": "1"},
}


def run(switches: dict[str, str]) -> list[float]:
    """Runs the script under some switches; returns its losses and ids."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(SCRIPT.parent.parent.parent),
        **switches,
    }
    process = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return [float(word) for word in process.stdout.split()]


@pytest.fixture(scope="module")
def usual() -> list[float]:
    """The output of the script without a switch."""
    return run({})


@functools.cache
def run_raising() -> list[float]:
    """Runs the script under all switches that only raise."""
    return run({name: value for one in RAISING.values() for name, value in one.items()})


@pytest.mark.slow
@pytest.mark.parametrize("switch", [*RAISING, *OTHERS])
def test_a_global_switch_of_jax_changes_no_loss(switch, usual):
    found = run_raising() if switch in RAISING else run(OTHERS[switch])
    # New weights and two losses, then ids: draws of other keys differ, and so do roundings.
    assert found[:3] == pytest.approx(usual[:3], rel=1e-4)
    assert len(found) <= 7
