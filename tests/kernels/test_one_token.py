"""The kernels of a single token: named on a GPU, and the rule in a TPU's decoding loop."""

import abstract_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wkv_reference
from tolerances import WKV, assert_close

import pallas_kernels
from pallas_kernels.cases import MODES, Case, make_inputs
from pallas_kernels.tpu import token_step

KERNELS = ("pallas_gpu", "pallas_tpu")
# Of a TPU's heads, two or four share a tile. Three leave one half or mostly empty.
SIZES = {
    "pallas_gpu": [(64, 32), (32, 64), (16, 128), (256, 64)],
    "pallas_tpu": [(64, 32), (32, 64), (64, 64), (256, 64)],
}
CASES = [(name, sizes) for name in KERNELS for sizes in SIZES[name]]

each = pytest.mark.parametrize("name", KERNELS)


def read(inputs, state, *, name, **options):
    """Reads a token by a kernel; on its own device the kernel itself runs."""
    interpret = name not in pallas_kernels.available()
    return pallas_kernels.wkv7(
        *inputs, state, implementation=name, interpret=interpret, **options
    )


read_one = jax.jit(read, static_argnames="name")


def token(inputs, at):
    return jax.tree.map(lambda x: x[:, at : at + 1], inputs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_token_by_token_matches_the_definition(name, sizes, mode, dtype):
    inputs, state = make_inputs(Case(2, 5, 3, *sizes, mode), dtype)
    y, states, _ = wkv_reference.forward(
        [np.asarray(x, np.float64) for x in inputs], np.asarray(state, np.float64)
    )
    read = []
    for at in range(5):
        one, state = read_one(token(inputs, at), state, name=name)
        assert one.dtype == dtype
        read.append(one)
    assert_close(jnp.concatenate(read, axis=1), y, WKV[dtype]["y"], "y")
    assert_close(state, states[-1], WKV["float32"]["state"], "state")


@each
def test_rows_and_heads_are_independent(name):
    # A TPU's grid step computes eight rows, so the second one is mostly empty.
    inputs, state = make_inputs(Case(9, 1, 4, 32, 64))
    y, end = read_one(inputs, state, name=name)
    part = jax.tree.map(lambda x: x[1:2, :, 2:3], inputs)
    one_y, one_end = read_one(part, state[1:2, 2:3], name=name)
    np.testing.assert_array_equal(one_y, y[1:2, :, 2:3])
    np.testing.assert_array_equal(one_end, end[1:2, 2:3])


@pytest.mark.parametrize("tokens", [1, 2])
def test_one_token_is_one_gpu_kernel_that_updates_the_state_in_place(tokens):
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


@each
def test_a_padding_token_keeps_the_state(name):
    inputs, state = make_inputs(Case(2, 1, 3, 32, 64))
    inputs = inputs._replace(v=inputs.v.at[1].set(jnp.nan))
    lengths = jnp.array([1, 0])
    y, end = read(inputs, state, name=name, lengths=lengths)
    np.testing.assert_array_equal(end[1], state[1])
    np.testing.assert_array_equal(y[1], 0)
    assert not np.array_equal(end[0], state[0])


def test_a_head_that_is_not_finite_spoils_no_other_in_its_tile():
    inputs, state = make_inputs(Case(1, 1, 2, 64, 64))
    expected, end = read_one(inputs, state, name="pallas_tpu")
    y, end_beside = read_one(inputs, state.at[0, 0].set(jnp.nan), name="pallas_tpu")
    assert np.isnan(y[0, 0, 0]).all()
    np.testing.assert_array_equal(y[0, 0, 1], expected[0, 0, 1])
    np.testing.assert_array_equal(end_beside[0, 1], end[0, 1])


def test_tiling_states_loses_nothing():
    _, state = make_inputs(Case(2, 1, 5, 32, 64))
    tiled = token_step.tile(state)
    assert tiled.tiles.shape == (2, 2, 64, 128)
    np.testing.assert_array_equal(token_step.untile(tiled), state)


def test_a_row_that_is_not_live_keeps_its_tiled_state():
    inputs, state = make_inputs(Case(3, 1, 3, 64, 64))
    tiled = token_step.tile(state)
    expected, end = token_step.step(inputs, tiled)
    inputs = inputs._replace(v=inputs.v.at[1].set(jnp.nan))
    live = jnp.array([True, False, True])
    y, end_of_live = token_step.step(inputs, tiled, live)
    np.testing.assert_array_equal(y[1], 0)
    np.testing.assert_array_equal(end_of_live.tiles[1], tiled.tiles[1])
    np.testing.assert_array_equal(y[::2], expected[::2])
    np.testing.assert_array_equal(end_of_live.tiles[::2], end.tiles[::2])


def test_a_step_of_tiled_states_is_one_tpu_kernel_that_updates_them_in_place():
    inputs, state = make_inputs(Case(2, 1, 4, 64, 64), "bfloat16")
    with jax.sharding.use_abstract_mesh(abstract_devices.mesh("tpu")):
        traced = jax.jit(token_step.step).trace(inputs, token_step.tile(state))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 1
    assert "output_operand_alias" in text
    # The states are not moved.
    assert "tensor<2x2x2x64x64xf32>" not in text
