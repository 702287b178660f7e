"""The GPU kernel of a single token, as decoding uses it where it is named."""

import abstract_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wkv_reference
from tolerances import WKV, assert_close

import pallas_kernels
from pallas_kernels.cases import MODES, Case, make_inputs

# On a GPU the kernel itself runs.
OPTIONS = {
    "implementation": "pallas_gpu",
    "interpret": "pallas_gpu" not in pallas_kernels.available(),
}


@jax.jit
def read_one(inputs, state):
    """Reads a token by the kernel."""
    return pallas_kernels.wkv7(*inputs, state, **OPTIONS)


def token(inputs, at):
    return jax.tree.map(lambda x: x[:, at : at + 1], inputs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "sizes", [(64, 32), (32, 64), (16, 128), (256, 64)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_token_by_token_matches_the_definition(sizes, mode, dtype):
    inputs, state = make_inputs(Case(2, 5, 3, *sizes, mode), dtype)
    y, states, _ = wkv_reference.forward(
        [np.asarray(x, np.float64) for x in inputs], np.asarray(state, np.float64)
    )
    read = []
    for at in range(5):
        one, state = read_one(token(inputs, at), state)
        assert one.dtype == dtype
        read.append(one)
    assert_close(jnp.concatenate(read, axis=1), y, WKV[dtype]["y"], "y")
    assert_close(state, states[-1], WKV["float32"]["state"], "state")


def test_rows_and_heads_are_independent():
    inputs, state = make_inputs(Case(3, 1, 4, 32, 64))
    y, end = read_one(inputs, state)
    part = jax.tree.map(lambda x: x[1:2, :, 2:3], inputs)
    one_y, one_end = read_one(part, state[1:2, 2:3])
    np.testing.assert_array_equal(one_y, y[1:2, :, 2:3])
    np.testing.assert_array_equal(one_end, end[1:2, 2:3])


@pytest.mark.parametrize("tokens", [1, 2])
def test_one_token_is_one_kernel_that_updates_the_state_in_place(tokens):
    inputs, state = make_inputs(Case(2, tokens, 3, 64, 64), "bfloat16")

    def run(inputs, state):
        return pallas_kernels.wkv7(*inputs, state, implementation="pallas_gpu")

    with jax.sharding.use_abstract_mesh(abstract_devices.mesh("gpu")):
        traced = jax.jit(run).trace(inputs, state)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 1
    assert ("wkv7_token_kernel" in text) == (tokens == 1)
    assert ("output_operand_alias" in text) == (tokens == 1)
    # Neither padded to a chunk nor copied.
    assert ("stablehlo.pad" in text) == (tokens != 1)


def test_a_padding_token_keeps_the_state():
    inputs, state = make_inputs(Case(2, 1, 3, 32, 64))
    inputs = inputs._replace(v=inputs.v.at[1].set(jnp.nan))
    lengths = jnp.array([1, 0])
    y, end = pallas_kernels.wkv7(*inputs, state, lengths=lengths, **OPTIONS)
    np.testing.assert_array_equal(end[1], state[1])
    np.testing.assert_array_equal(y[1], 0)
    assert not np.array_equal(end[0], state[0])
