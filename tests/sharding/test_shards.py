"""Weights in shards on eight devices: the same numbers, and nothing whole that should not be."""

import json
import os
import subprocess
import sys

import jax
import pytest
from eight_devices import LENGTH, MESHES, OF_WEIGHTS, ROWS, SIZES, weights
from run_programs import ROOT

from rwkv7_jax import sharding
from rwkv7_jax.sharding.layout import path_name, spec

pytestmark = pytest.mark.slow

CASES = [f"weights, {mesh}" for mesh in MESHES]
CASES += [f"state, {mesh}" for mesh in MESHES if mesh not in OF_WEIGHTS]
GATHERED = [name for name in MESHES if "fsdp" in name]
GATHERED_CASES = [case for case in CASES if "fsdp" in case]
# Relative L2 errors in float32.
LOSS = 1e-6
GRADIENT = {"state": 5e-6, "weights": 1e-5}
LOSSES = 1e-5

# The largest matrix of a block.
MATRIX = SIZES.width * SIZES.ffn_width

# The residual stream of a batch.
ACTIVATIONS = ROWS * LENGTH * SIZES.width


@pytest.fixture(scope="module")
def measured():
    """What the child process, which has eight devices, found."""
    done = subprocess.run(
        [sys.executable, "tests/support/eight_devices.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_match_the_loss_and_gradients_of_one(measured, case):
    found = measured[case]
    assert found["loss"] <= LOSS
    assert found["gradient"] <= GRADIENT[case.split(",")[0]]


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_match_one_over_twenty_steps(measured, case):
    assert measured[case]["losses"] <= LOSSES


def test_sharded_gradient_accumulation_matches_the_batch(measured):
    assert measured["16 rows in 2"] <= GRADIENT["state"]


def test_indivisible_rows_are_computed_by_every_device(measured):
    assert measured["3 rows in 1"] <= GRADIENT["state"]


def test_two_stage_gathers_match_the_gradients_of_one_device(measured):
    found = measured["two stages"]
    assert found["loss"] <= LOSS and found["gradient"] <= GRADIENT["weights"]
    # Four neighbours first, which have half of a matrix together.
    gathered = set(found["collectives"]["all-gather"])
    assert {MATRIX, MATRIX // 2} <= gathered
    assert MATRIX // 2 not in measured["weights, fsdp 8"]["collectives"]["all-gather"]


def test_int8_weights_are_gathered_as_integers(measured):
    assert measured["int8"] <= LOSS


@pytest.mark.parametrize("case", GATHERED_CASES)
def test_no_gather_is_larger_than_a_matrix_of_a_block(measured, case):
    assert max(measured[case]["collectives"]["all-gather"]) <= MATRIX


@pytest.mark.parametrize("case", CASES)
def test_no_device_holds_a_complete_stack_of_matrices(measured, case):
    whole = f"[{SIZES.num_layers - 1},{SIZES.ffn_width},{SIZES.width}]"
    assert not [one for one in measured[case]["shapes"] if one.endswith(whole)]


@pytest.mark.parametrize("mesh", GATHERED)
def test_gradients_of_trained_matrices_are_reduce_scattered(measured, mesh):
    assert measured[f"weights, {mesh}"]["collectives"]["reduce-scatter"]
    if mesh not in OF_WEIGHTS:
        assert "reduce-scatter" not in measured[f"state, {mesh}"]["collectives"]


@pytest.mark.parametrize("case", GATHERED_CASES)
def test_tokens_are_communicated_instead_of_the_embedding(measured, case):
    assert measured[case]["collectives"]["all-to-all"]


def test_tensor_parallel_devices_reduce_activations_and_gather_no_weight(measured):
    found = measured["state, tensor 2"]["collectives"]
    assert set(found) == {"all-reduce", "all-gather"}
    # What the head gives back, of which each has half of the tokens; and sums over ids.
    ids = 2 * ROWS * LENGTH
    assert {size for size in found["all-gather"] if size > ids} == {ACTIVATIONS}
    # And the tuned token shifts, before they are summed over rows.
    shifts = SIZES.num_layers * ROWS * SIZES.width
    large = {size for size in found["all-reduce"] if size > 1}
    assert large == {ACTIVATIONS, shifts}


def test_no_gradient_is_communicated_between_heads(measured):
    states = SIZES.num_layers * ROWS * SIZES.width * SIZES.head_size
    matrices = {SIZES.width**2, SIZES.width * SIZES.ffn_width}
    replicated = {
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights())
        if sharding.TENSOR not in spec(path_name(path), leaf.shape, {"tensor": 2})
    }
    for trained in ("state", "weights"):
        found = measured[f"{trained}, tensor 2"]["collectives"]
        reduced = set(found["all-reduce"])
        assert not reduced & {states, states // 2}
        # Those that all devices have get the sum of what the heads say; some have these sizes too.
        halves = {n * size // 2 for size in matrices for n in (1, 2)}
        assert not reduced & (halves - replicated)
