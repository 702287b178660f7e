"""One row's tokens on several devices give the numbers of one device.

A vmapped axis stands for the devices: collectives along it are the same.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import pallas_kernels
from pallas_kernels import WKVInputs, cases
from rwkv7_jax.model import time_shards, token_shift

AXIS = "sequence"
CASE = cases.Case(batch=2, tokens=120, heads=3, key_size=16, value_size=24)


def _cut(x, count):
    """[B T ...] -> [n B T/n ...]."""
    pieces = x.reshape(x.shape[0], count, -1, *x.shape[2:])
    return jnp.moveaxis(pieces, 1, 0)


def _join(x):
    """[n B T/n ...] -> [B T ...]."""
    rows = jnp.moveaxis(x, 0, 1)
    return rows.reshape(rows.shape[0], -1, *rows.shape[3:])


@jax.jit
def _whole(inputs, state, lengths=None):
    return pallas_kernels.wkv7(
        *inputs, state, implementation="chunked", lengths=lengths
    )


@functools.partial(jax.jit, static_argnames="count")
def _along_time(inputs, state, count, lengths=None):
    def one_device(*pieces):
        own = lengths
        if lengths is not None:
            own = time_shards.local_lengths(lengths, pieces[0].shape[1], AXIS)

        def op(inputs, state):
            return _whole(inputs, state, own)

        return time_shards.wkv7_along_time(op, WKVInputs(*pieces), state, AXIS)

    pieces = [_cut(x, count) for x in inputs]
    y, ends = jax.vmap(one_device, axis_name=AXIS)(*pieces)
    return _join(y), ends


def _error(value, expected):
    value = np.asarray(value, np.float64)
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_any_number_of_devices_matches_one(count, mode):
    case = cases.Case(**{**vars(CASE), "mode": mode})
    inputs, state = cases.make_inputs(case)
    y, ends = _along_time(inputs, state, count)
    whole_y, whole_end = _whole(inputs, state)
    assert _error(y, whole_y) < 1e-6
    for end in ends:
        assert _error(end, whole_end) < 1e-6


@pytest.mark.parametrize("count", [3, 4])
def test_gradients_of_inputs_and_start_state_match_one_device(count):
    inputs, state = cases.make_inputs(CASE)
    keys = jax.random.split(jax.random.key(1), 2)
    weights = jax.random.normal(keys[0], inputs.v.shape)
    end_weights = jax.random.normal(keys[1], state.shape)

    def loss(arguments, run):
        y, end = run(*arguments)
        return jnp.sum(y * weights) + jnp.sum(end * end_weights)

    def last_of_many(inputs, state):
        y, ends = _along_time(inputs, state, count)
        return y, ends[-1]

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    found = slope((inputs, state), last_of_many)
    expected = slope((inputs, state), _whole)
    for value, wanted in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert _error(value, wanted) < 2e-6


def test_rows_that_end_on_different_devices_match_one_device():
    inputs, state = cases.make_inputs(CASE)
    for lengths in ([0, 120], [1, 30], [31, 119], [60, 90]):
        lengths = jnp.array(lengths)
        y, ends = _along_time(inputs, state, 4, lengths)
        whole_y, whole_end = _whole(inputs, state, lengths)
        assert _error(ends[0], whole_end) < 1e-6
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(
                y[row, :length], whole_y[row, :length], rtol=0, atol=2e-5
            )


def test_the_token_shift_crosses_devices_bit_for_bit():
    x = jax.random.normal(jax.random.key(2), (2, 12, 5))
    before = jax.random.normal(jax.random.key(3), (2, 5))

    def one_device(piece):
        first = time_shards.previous_token(piece, before, AXIS)
        return token_shift.previous_tokens(piece, first)

    shifted = jax.vmap(one_device, axis_name=AXIS)(_cut(x, 4))
    np.testing.assert_array_equal(
        _join(shifted), token_shift.previous_tokens(x, before)
    )


@pytest.mark.parametrize("lengths", [[0, 12], [1, 3], [4, 11], [9, 6]])
def test_the_last_valid_token_is_found_on_its_device(lengths):
    x = jax.random.normal(jax.random.key(2), (2, 12, 5))
    before = jax.random.normal(jax.random.key(3), (2, 5))
    lengths = jnp.array(lengths)

    def one_device(piece):
        tokens = piece.shape[1]
        first = time_shards.previous_token(piece, before, AXIS)
        own = time_shards.local_lengths(lengths, tokens, AXIS)
        last = token_shift.last_token(piece, first, own)
        return time_shards.from_last_token(last, own, tokens, AXIS)

    found = jax.vmap(one_device, axis_name=AXIS)(_cut(x, 4))
    expected = token_shift.last_token(x, before, lengths)
    for value in found:
        np.testing.assert_array_equal(value, expected)


def test_a_device_exchanges_two_matrices_per_round_and_one_start_state():
    inputs, state = cases.make_inputs(CASE)
    # By name: the default has changed between versions of JAX.
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((8,), (AXIS,), axis_types=automatic)
    along_time = PartitionSpec(None, AXIS)

    def one_device(inputs, state):
        return time_shards.wkv7_along_time(_whole, inputs, state, AXIS)

    program = jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(along_time, PartitionSpec()),
        out_specs=(along_time, PartitionSpec()),
        check_vma=False,
    )
    sent = str(jax.make_jaxpr(program)(inputs, state)).count("ppermute[")
    # Three rounds for eight devices; the last one needs no M.
    assert sent == 1 + 2 * 3 - 1
