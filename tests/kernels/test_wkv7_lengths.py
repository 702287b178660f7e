"""Rows of a batch end at `lengths`, and tokens of zeros change nothing."""

import functools

import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import SAME, assert_close
from wkv_inputs import CASE, INPUTS, INTERPRETED, STATE, op

LENGTHS = (21, 9, 0)
KERNELS = [pytest.param(name, marks=pytest.mark.slow) for name in INTERPRETED]
each = pytest.mark.parametrize("implementation", ["scan", "chunked", *KERNELS])


@functools.partial(jax.jit, static_argnames="implementation")
def gradients(inputs, state, lengths, *, implementation):
    """Returns y, the last state and the gradients of a sum over both."""

    def loss(inputs, state):
        y, end = op(inputs, state, lengths=lengths, implementation=implementation)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(end)), (y, end)

    grads, (y, end) = jax.grad(loss, argnums=(0, 1), has_aux=True)(inputs, state)
    return y, end, grads


@each
def test_lengths_make_a_row_in_a_batch_equal_the_row_alone(implementation):
    y, end, (grads, dstate) = gradients(
        INPUTS, STATE, jnp.array(LENGTHS), implementation=implementation
    )
    row = slice(1, 2)
    length = LENGTHS[1]
    alone = jax.tree.map(lambda x: x[row, :length], INPUTS)
    y1, end1, (grads1, dstate1) = gradients(
        alone, STATE[row], jnp.array([length]), implementation=implementation
    )
    assert_close(y[row, :length], y1, SAME["op"], "y")
    assert_close(end[row], end1, SAME["op"], "end")
    assert_close(dstate[row], dstate1, SAME["op"], "gradient of state")
    for left, right in zip(grads, grads1, strict=True):
        assert_close(left[row, :length], right, 2e-5)


@each
def test_padding_reads_zeros_and_has_no_gradient_even_where_it_is_nan(implementation):
    lengths = jnp.array(LENGTHS)
    padding = (jnp.arange(CASE.tokens)[None] >= lengths[:, None])[..., None, None]
    poisoned = tuple(jnp.where(padding, jnp.nan, x) for x in INPUTS)
    clean = gradients(INPUTS, STATE, lengths, implementation=implementation)
    dirty = gradients(poisoned, STATE, lengths, implementation=implementation)
    for left, right in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(left, right)
    y, end, (grads, _) = dirty
    for x in (y, *grads):
        assert not np.any(np.where(padding, x, 0))
    np.testing.assert_array_equal(end[2], STATE[2])


@each
def test_tokens_of_zeros_keep_the_state(implementation):
    padded = tuple(jnp.pad(x, ((0, 0), (0, 11), (0, 0), (0, 0))) for x in INPUTS)
    run = jax.jit(functools.partial(op, implementation=implementation))
    y, end = run(INPUTS, STATE)
    same, last = run(padded, STATE)
    assert_close(same[:, :21], y, SAME["op"], "y")
    assert not np.any(same[:, 21:])
    assert_close(last, end, SAME["op"], "end")


@pytest.mark.parametrize("implementation", [None, "scan", "chunked"])
def test_a_nan_cotangent_in_padding_reaches_no_gradient(implementation):
    lengths = jnp.array(LENGTHS)
    padding = (jnp.arange(CASE.tokens)[None] >= lengths[:, None])[..., None, None]

    @jax.jit
    def pull(dy):
        run = functools.partial(op, lengths=lengths, implementation=implementation)
        (_, end), pull = jax.vjp(run, INPUTS, STATE)
        return pull((dy, jnp.cos(end)))

    dy = jnp.cos(INPUTS[3])
    clean = pull(jnp.where(padding, 0, dy))
    dirty = pull(jnp.where(padding, jnp.nan, dy))
    for left, right in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(left, right)
