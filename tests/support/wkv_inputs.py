"""Inputs of the op that several test files share: uneven sizes, a length that is not round."""

import pytest

import pallas_kernels
from pallas_kernels.cases import Case, make_inputs

CASE = Case(3, 21, 2, key_size=32, value_size=64)
INPUTS, STATE = make_inputs(CASE)
# Kernels that run here in Pallas's interpreter; Triton's have tests of their own.
INTERPRETED = ("pallas_tpu", "pallas_gpu")
each = pytest.mark.parametrize("implementation", ("scan", "chunked", *INTERPRETED))


def op(inputs, state, *, implementation=None, **options):
    """Calls the op on the six inputs as one argument."""
    return pallas_kernels.wkv7(
        *inputs,
        state,
        implementation=implementation,
        interpret=implementation in INTERPRETED,
        **options,
    )
