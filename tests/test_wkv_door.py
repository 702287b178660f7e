"""The op's public door: lengths, choice of implementation, messages, other platforms."""

import functools

import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import SAME, assert_close

import pallas_kernels
from pallas_kernels.cases import Case, make_inputs
from pallas_kernels.reference import NAMES

CASE = Case(3, 21, 2, key_size=16, value_size=24)
LENGTHS = (21, 9, 0)
INPUTS, STATE = make_inputs(CASE)
each = pytest.mark.parametrize("implementation", pallas_kernels.IMPLEMENTATIONS)


def op(inputs, state, **options):
    """The op on a tuple."""
    return pallas_kernels.wkv7(*inputs, state, **options)


@functools.partial(jax.jit, static_argnames="implementation")
def gradients(inputs, state, lengths, *, implementation):
    """y, the last state and the gradients of a sum over both."""

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
    row, length = slice(1, 2), LENGTHS[1]
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
def test_tokens_of_zeros_change_nothing(implementation):
    padded = tuple(jnp.pad(x, ((0, 0), (0, 11), (0, 0), (0, 0))) for x in INPUTS)
    run = jax.jit(functools.partial(op, implementation=implementation))
    (y, end), (same, last) = run(INPUTS, STATE), run(padded, STATE)
    assert_close(same[:, :21], y, SAME["op"], "y")
    assert not np.any(same[:, 21:])
    assert_close(last, end, SAME["op"], "end")


def primitives(jaxpr):
    """Every equation below `jaxpr`, as (name, parameters)."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, equation.params
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from primitives(inner)


def witness(implementation, differentiated):
    """Whether running sums of decays appear (chunks have them), and the lengths of the loops."""
    run = functools.partial(op, implementation=implementation)
    if differentiated:
        run = jax.grad(lambda *x: jnp.sum(op(*x, implementation=implementation)[0]))
    found = list(primitives(jax.make_jaxpr(run)(INPUTS, STATE).jaxpr))
    loops = {parameters["length"] for name, parameters in found if name == "scan"}
    return any(name == "cumsum" for name, _ in found), loops


def test_the_implementation_asked_for_is_the_one_that_runs():
    assert witness("scan", differentiated=False) == (False, {21})
    assert witness("chunked", differentiated=False) == (True, {2})
    assert witness("scan", differentiated=True) == (False, {2, 16})
    assert witness("chunked", differentiated=True) == (True, {2})


# The products between the tokens of one chunk, per row and head: only "chunked" has them.
SQUARES = "tensor<3x2x16x16xf32>"


@pytest.mark.parametrize(("platform", "chunks"), [("cpu", False), ("tpu", True), ("cuda", True)])
def test_without_a_name_every_platform_gets_its_own_from_any_machine(platform, chunks):
    traced = jax.jit(op).trace(INPUTS, STATE)
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    assert (SQUARES in lowered) == chunks


def test_one_exported_program_serves_every_platform():
    exported = jax.export.export(jax.jit(op), platforms=("cpu", "tpu", "cuda"))(INPUTS, STATE)
    for left, right in zip(exported.call(INPUTS, STATE), jax.jit(op)(INPUTS, STATE), strict=True):
        assert_close(left, right, SAME["op"])


@each
def test_the_second_call_does_not_compile(implementation):
    traces = []

    @jax.jit
    def run(inputs, state):
        traces.append(1)
        return op(inputs, state, implementation=implementation)

    _, state = run(INPUTS, STATE)
    run(jax.tree.map(lambda x: 0.5 * x, INPUTS), state)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            {"implementation": "fast"},
            ValueError,
            "wkv7: `implementation` must be None or one of scan, chunked; got 'fast'.",
        ),
        ({"chunk": 24}, ValueError, "wkv7: `chunk` must be one of (16, 32, 64); got 24."),
        (
            {"k": INPUTS[2][:, :5]},
            ValueError,
            "wkv7: `k` must have shape (3, 21, 2, 16) beside `r`; got (3, 5, 2, 16).",
        ),
        (
            {"v": INPUTS[3][0]},
            ValueError,
            "wkv7: `v` must have shape [B T H N]; got (21, 2, 24).",
        ),
        (
            {"state": STATE.mT},
            ValueError,
            "wkv7: `state` must have shape [B H Nv Nk] = (3, 2, 24, 16); got (3, 2, 16, 24).",
        ),
        (
            {"state": STATE.astype("bfloat16")},
            TypeError,
            "wkv7: `state` must be float32; got bfloat16.",
        ),
        (
            {"a": INPUTS[4].astype(int)},
            TypeError,
            "wkv7: `a` must be floating point; got int32.",
        ),
        (
            {"lengths": jnp.array([1, 2])},
            ValueError,
            "wkv7: `lengths` must be 3 integers, one a row; got shape (2,) of int32.",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_named_in_one_sentence(unchecked, change, error, sentence):
    arguments = dict(zip(NAMES, INPUTS, strict=True))
    with pytest.raises(error) as caught:
        pallas_kernels.wkv7(**(arguments | {"state": STATE} | change))
    assert str(caught.value) == sentence
