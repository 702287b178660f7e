"""Second derivatives of the op, and forward mode."""

import functools

import abstract_devices
import jax
import jax.numpy as jnp
import pytest
from tolerances import assert_close
from wkv_inputs import op

import pallas_kernels
from pallas_kernels import WKVInputs, wkv7_reference
from pallas_kernels.cases import Case, make_inputs

# 21 tokens are a chunk and a part of one. The kernels take heads of these sizes.
INPUTS, STATE = make_inputs(Case(1, 21, 2, 32, 64))
EXACT = 1e-10


def total(run, inputs, state):
    """Sums a nonlinear function of both results."""
    y, end = run(inputs, state)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(end))


def second_derivatives(run):
    """Returns the gradients of a function of the seven gradients of `run`."""
    first = jax.grad(functools.partial(total, run), argnums=(0, 1))

    def of_gradients(inputs, state):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(first(inputs, state)))

    return jax.grad(of_gradients, argnums=(0, 1))


def reference(inputs, state):
    """Runs the definition, which is differentiated by JAX alone."""
    return wkv7_reference(WKVInputs(*inputs), state)


def as_float64(tree):
    return jax.tree.map(lambda x: x.astype("float64"), tree)


@pytest.mark.parametrize("implementation", [None, "scan", "chunked"])
def test_second_derivatives_match_the_definition(implementation):
    run = functools.partial(op, implementation=implementation)
    with jax.enable_x64(True):
        arguments = as_float64((INPUTS, STATE))
        found = jax.jit(second_derivatives(run))(*arguments)
        expected = jax.jit(second_derivatives(reference))(*arguments)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for left, right in pairs:
        assert_close(left, right, EXACT)


def test_forward_mode_of_a_gradient_is_a_hessian_vector_product():
    with jax.enable_x64(True):
        inputs, state = as_float64((INPUTS, STATE))

        def product(run):
            gradient = jax.grad(lambda state: total(run, inputs, state))
            return jax.jit(lambda s: jax.jvp(gradient, (s,), (jnp.sin(s),))[1])(state)

        assert_close(product(op), product(reference), EXACT)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("named", [False, True])
def test_second_derivatives_are_lowered_for_accelerators(platform, named):
    name = f"pallas_{platform}" if named else None
    lowered = "cuda" if platform == "gpu" else platform

    def run(inputs, state):
        return pallas_kernels.wkv7(*inputs, state, implementation=name)

    with jax.sharding.use_abstract_mesh(abstract_devices.mesh(platform)):
        traced = jax.jit(second_derivatives(run)).trace(INPUTS, STATE)
        text = traced.lower(lowering_platforms=(lowered,)).as_text()
    # The first derivatives are the kernels' own.
    assert text.count(abstract_devices.MARKS[lowered]) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_second_derivatives_through_kernels_match_plain_jax(implementation):
    run = functools.partial(op, implementation=implementation)
    found = jax.jit(second_derivatives(run))(INPUTS, STATE)
    expected = jax.jit(second_derivatives(op))(INPUTS, STATE)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for left, right in pairs:
        assert_close(left, right, 1e-4)


@pytest.mark.parametrize("implementation", [None, "scan", "chunked"])
def test_forward_mode_of_the_op_raises_one_sentence(implementation):
    run = functools.partial(op, INPUTS, implementation=implementation)
    for differentiate in (jax.jacfwd, lambda f: lambda s: jax.jvp(f, (s,), (s,))):
        with pytest.raises(TypeError, match="wkv7: forward-mode differentiation"):
            differentiate(run)(STATE)
