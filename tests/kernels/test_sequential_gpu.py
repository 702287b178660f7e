"""The sequential WKV-7 kernels that ours are compared with: right, and as inexact as we claim.

They run in Pallas's interpreter; nothing here needs a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wkv_reference
from tolerances import WKV, assert_close, relative_error

from benchmarks.sequential_gpu import sequential
from pallas_kernels.bench import forward_and_gradients
from pallas_kernels.cases import Case, make_inputs

CASE = Case(1, 32, 2, key_size=16, value_size=32)
FAST = Case(1, 32, 2, key_size=16, value_size=32, mode="fast")


def run(case):
    """Returns data, and y, the last state and seven gradients by the kernels."""
    inputs, state = make_inputs(case)
    data = (inputs, state, jnp.sin(inputs[3]), jnp.cos(state))
    op = functools.partial(sequential, interpret=True)
    return data, jax.jit(functools.partial(forward_and_gradients, op))(*data)


@pytest.mark.slow
def test_values_states_and_gradients_match_the_definition():
    data, (y, end, gradients) = run(CASE)
    true_y, true_end, true_gradients = wkv_reference.both(*data)
    bars = WKV["float32"]
    assert_close(y, true_y, bars["y"], "y")
    assert_close(end, true_end, bars["state"], "last state")
    names = ("r", "log_w", "k", "v", "a", "b", "state")
    for name, found, true in zip(names, gradients, true_gradients, strict=True):
        assert_close(found, true, bars["gradient"], f"gradient of {name}")


@pytest.mark.slow
def test_without_a_gradient_values_are_the_same():
    (inputs, state, *_), (y, end, _) = run(CASE)
    for found, same in zip(
        sequential(inputs, state, interpret=True), (y, end), strict=True
    ):
        np.testing.assert_allclose(found, same, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_dividing_by_the_strongest_decay_loses_as_many_digits_as_in_numpy():
    data, (*_, ours) = run(FAST)
    *_, true = wkv_reference.both(*data)
    *_, divided = wkv_reference.both(*data, dtype=np.float32, eps=0.0)
    *_, stored = wkv_reference.both(*data, dtype=np.float32)
    kernel, numpy, exact = (
        max(map(relative_error, g, true)) for g in (ours, divided, stored)
    )
    assert numpy / 10 <= kernel <= 10 * numpy, f"kernel {kernel:.2g}, numpy {numpy:.2g}"
    assert kernel >= 10 * exact, f"kernel {kernel:.2g}, from stored states {exact:.2g}"


def test_the_number_of_tokens_must_be_a_multiple_of_16():
    inputs, state = make_inputs(Case(1, 24, 1, key_size=16, value_size=16))
    with pytest.raises(ValueError, match=r"T must be a multiple of 16; got 24\.$"):
        sequential(inputs, state, interpret=True)
