"""The arithmetic of one chunk, in float64 and outside of any loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close

from pallas_kernels import chunk_math, wkv7_reference
from pallas_kernels.cases import MODES, Case, make_inputs
from pallas_kernels.reference import NAMES

EXACT = 1e-12


def prepare(r, log_w, a, b):
    """Prepares a chunk whose products take operands of its own dtype."""
    first, second = (
        jnp.sum(x, axis=-2)[..., None] for x in jnp.split(log_w, 2, axis=-2)
    )
    arithmetic = chunk_math.Arithmetic(log_w.dtype)
    return chunk_math.prepare(r, log_w, a, b, (first, second), arithmetic)


@pytest.mark.parametrize("side", [1, 2, 16, 64])
def test_the_inverse_of_a_unit_lower_triangle_matches_numpy(side):
    below = (
        np.tril(np.random.default_rng(0).normal(size=(3, side, side)), -1) / side**0.5
    )
    with jax.enable_x64(True):
        inverse = chunk_math.unit_inverse(
            jnp.asarray(below), chunk_math.Arithmetic(jnp.dtype("float64"))
        )
        inverse = np.asarray(inverse)
    assert_close(inverse, np.linalg.inv(np.eye(side) - below), EXACT)


def test_the_inverse_survives_repeated_keys():
    below = np.tril(
        -np.ones((64, 64), np.float32), -1
    )  # every product of two equal unit keys
    exact = chunk_math.Arithmetic(jnp.dtype("float32"))
    inverse = chunk_math.unit_inverse(jnp.asarray(below), exact)
    assert_close(inverse, np.linalg.inv(np.eye(64) - below), 1e-6)


def test_lower_masks_by_selection_not_by_multiplication():
    infinite = jnp.triu(jnp.full((4, 4), jnp.inf), 1)
    np.testing.assert_array_equal(chunk_math.lower(infinite), np.zeros((4, 4)))
    np.testing.assert_array_equal(
        chunk_math.lower(jnp.ones((3, 3)), -1), np.tril(np.ones((3, 3)), -1)
    )


def test_no_factor_leaves_the_range_of_float32_at_the_strongest_decay():
    inputs, _ = make_inputs(Case(1, 64, 1, mode="fast"))
    r, log_w, _, _, a, b = (x.transpose(0, 2, 1, 3) for x in inputs)
    chunk = prepare(r, log_w, a, b)
    assert all(
        float(jnp.abs(x).max()) < np.exp(25)
        for x in (chunk.upto, chunk.before, chunk.after)
    )


@jax.jit
def one_chunk(inputs, state, dy, dend):
    """Returns y, end and seven gradients by `chunk_math`, and by autodiff of the definition."""
    truth, pull = jax.vjp(wkv7_reference, inputs, state)
    grads, dstate = pull((dy, dend))
    r, log_w, k, v, a, b, dy = (x.swapaxes(1, 2) for x in (*inputs, dy))
    chunk = prepare(r, log_w, a, b)
    written = chunk_math.write_products(chunk, k, v)
    states = (state.mT * chunk.mid, dend.mT * chunk.rest)
    y, end = chunk_math.forward(chunk, written, states[0])
    read = chunk_math.read_products(chunk)
    u = chunk_math.removals(chunk, read.inverse, written, states[0])
    z = chunk_math.removal_gradients(
        chunk, chunk_math.transposed_read_products(chunk), dy, states[1]
    )
    by_name = dict(chunk_math.gradients(chunk, written, u, z, states, dy))
    back = (by_name[name] for name in NAMES)
    dstart = chunk_math.state_gradient(chunk, z, dy, states[1]) * chunk.mid
    ends = ((end * chunk.rest).mT, *(x.swapaxes(1, 2) for x in back), dstart.mT)
    ours = (y.swapaxes(1, 2), *ends)
    return ours, (*truth, *grads, dstate)


@pytest.mark.parametrize("mode", MODES)
def test_one_chunk_matches_the_definition_and_its_gradient(mode):
    inputs, state = make_inputs(Case(2, 16, 2, key_size=8, value_size=12, mode=mode))
    dy = np.sin(np.asarray(inputs[3]))
    dend = np.cos(np.asarray(state))
    arrays = jax.tree.map(
        lambda x: np.asarray(x, np.float64), (inputs, state, dy, dend)
    )
    with jax.enable_x64(True):
        pairs = jax.tree.map(np.asarray, one_chunk(*arrays))
    for left, right in zip(*pairs, strict=True):
        assert left.dtype == np.float64
        assert_close(left, right, EXACT)
