"""Laws that hold for every implementation of the op, for all sizes and data."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wkv_reference
from tolerances import AS_USERS, SAME, WKV, assert_close

import pallas_kernels
from pallas_kernels.cases import MODES, Case, make_inputs

NAMES = ("r", "log_w", "k", "v", "a", "b", "state")
# Kernels of other devices run in Pallas's interpreter. On a GPU or TPU, run this file by
# JAX_PLATFORMS=cuda (or tpu) python -m pytest -n 0 -m "slow or not slow" \
#     tests/kernels/test_wkv7_laws.py
AVAILABLE = pallas_kernels.available()
INTERPRETED = {"pallas_tpu", "pallas_gpu"} - set(AVAILABLE)
# Every implementation at each chunk that changes its arithmetic.
KERNELS = [
    ("pallas_tpu", 32),
    ("pallas_tpu", 64),
    ("pallas_gpu", 16),
    ("pallas_gpu", 32),
]
KERNELS += [("triton", 16), ("triton", 32)] if "triton" in AVAILABLE else []
KERNELS = [pytest.param(*form, marks=pytest.mark.slow) for form in KERNELS]
BETWEEN = pytest.param("chunked", 32, marks=pytest.mark.slow)
FORMS = [("scan", 16), ("chunked", 16), BETWEEN, ("chunked", 64), *KERNELS]
EACH = [("scan", 16), ("chunked", 16), *KERNELS[::2]]
WIDE = Case(2, 67, 2, key_size=32, value_size=64)
FLAT = Case(1, 67, 2, key_size=64, value_size=32)
ODD = Case(1, 67, 3, key_size=24, value_size=40)
# A chunk and more than half of one. The TPU kernel has two steps of two tiles of two heads, the
# last one half empty; the GPU kernels have several blocks of values.
SHORT = {
    "pallas_tpu": Case(2, 29, 7, key_size=64, value_size=64),
    "pallas_gpu": Case(2, 29, 3, key_size=64, value_size=128),
}
LARGE = [Case(1, 130, 1, *sizes) for sizes in ((128, 64), (64, 256), (256, 256))]

forms = pytest.mark.parametrize(("implementation", "chunk"), FORMS)
each = pytest.mark.parametrize(("implementation", "chunk"), EACH)


STATIC = ("implementation", "chunk")


@functools.partial(jax.jit, static_argnames=STATIC)
def forward(inputs, state, *, implementation, chunk):
    """Returns y and the last state."""
    return pallas_kernels.wkv7(
        *inputs,
        state,
        implementation=implementation,
        chunk=chunk,
        interpret=implementation in INTERPRETED,
    )


def _both(inputs, state, dy, dend, *, implementation, chunk):
    """Returns y, the last state and the gradients of all seven arrays."""

    def op(*arguments):
        return pallas_kernels.wkv7(
            *arguments,
            implementation=implementation,
            chunk=chunk,
            interpret=implementation in INTERPRETED,
        )

    (y, end), pull = jax.vjp(op, *inputs, state)
    return y, end, pull((dy.astype(y.dtype), dend))


both = jax.jit(_both, static_argnames=STATIC, compiler_options=AS_USERS)
quick = jax.jit(_both, static_argnames=STATIC)


@functools.cache
def _draw(case, dtype, seed):
    noise = jax.random.key(seed + 1)
    inputs, state = make_inputs(case, dtype, seed)
    # A dy that resembles v: the decay's gradient then cancels, and rounding shows most.
    dy = jnp.sin(inputs[3])
    dend = jax.random.normal(noise, state.shape)
    return jax.tree.map(np.asarray, (inputs, state, dy, dend))


def data(case, dtype="float32", seed=0):
    """Returns inputs, start state, and the gradients of y and of the last state."""
    inputs, state, dy, dend = _draw(dataclasses.replace(case, tokens=130), dtype, seed)
    inputs, dy = jax.tree.map(lambda x: x[:, : case.tokens], (inputs, dy))
    return jax.tree.map(jnp.asarray, (inputs, state, dy, dend))


@functools.cache
def expected(case, dtype="float32"):
    """Returns the results of the float64 definition on `data`."""
    return wkv_reference.both(*data(case, dtype))


def bar(dtype, name, mode):
    """Returns the tolerance of a gradient."""
    special = f"gradient of {name}, {mode} keys"
    return WKV[dtype].get(special, WKV[dtype]["gradient"])


def check(case, dtype, run=both, **form):
    """Compares all nine outputs with the definition."""
    inputs, *others = data(case, dtype)
    y, end, grads = run(inputs, *others, **form)
    true_y, true_end, true_grads = expected(case, dtype)
    # "scan" and "chunked" compute in float32.
    assert y.dtype == inputs.v.dtype
    assert_close(y, true_y, WKV[dtype]["y"], "y")
    assert_close(end, true_end, WKV[dtype]["state"], "end")
    for name, grad, true in zip(NAMES, grads, true_grads, strict=True):
        assert_close(grad, true, bar(dtype, name, case.mode), f"gradient of {name}")


def test_the_numpy_reference_matches_autodiff_of_the_definition_in_float64():
    arguments = jax.tree.map(np.asarray, data(WIDE))
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arguments)
        inputs, state, dy, dend = arguments
        (y, end), pull = jax.vjp(pallas_kernels.wkv7_reference, inputs, state)
        grads, dstate = pull((dy, dend))
        actuals = [np.asarray(x) for x in (y, end, *grads, dstate)]
    true_y, true_end, true_grads = expected(WIDE)
    for actual, true in zip(actuals, (true_y, true_end, *true_grads), strict=True):
        assert_close(actual, true, 1e-13)


@forms
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_float64_definition(implementation, chunk, mode):
    case = dataclasses.replace(WIDE, mode=mode)
    check(case, "float32", implementation=implementation, chunk=chunk)


@each
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_float64_definition_with_more_keys_than_values(
    implementation, chunk, mode
):
    case = dataclasses.replace(FLAT, mode=mode)
    check(case, "float32", quick, implementation=implementation, chunk=chunk)


@pytest.mark.parametrize(("implementation", "chunk"), [("scan", 16), ("chunked", 32)])
def test_equals_the_float64_definition_with_odd_sizes(implementation, chunk):
    check(ODD, "float32", quick, implementation=implementation, chunk=chunk)


@pytest.mark.parametrize("implementation", sorted(INTERPRETED))
def test_interpreted_kernels_equal_the_float64_definition_on_short_rows(implementation):
    check(
        SHORT[implementation],
        "float32",
        quick,
        implementation=implementation,
        chunk=16,
    )


def test_the_default_implementation_equals_the_definition():
    inputs, state, *_ = data(WIDE)
    y, end = forward(inputs, state, implementation=None, chunk=16)
    true_y, true_end, _ = expected(WIDE)
    assert_close(y, true_y, WKV["float32"]["y"], "y")
    assert_close(end, true_end, WKV["float32"]["state"], "end")


@pytest.mark.slow
@forms
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", LARGE, ids=["128x64", "64x256", "256x256"])
def test_equals_the_float64_definition_with_large_heads(
    implementation, chunk, case, mode
):
    if (
        implementation in ("pallas_gpu", "triton")
        and case.key_size * case.value_size > 2**14
    ):
        pytest.skip("too large for a GPU's registers")
    if implementation in INTERPRETED and (mode != "fast" or chunk == 64):
        pytest.skip("one mode and chunk show it")
    case = dataclasses.replace(case, mode=mode)
    check(case, "float32", quick, implementation=implementation, chunk=chunk)


@pytest.mark.parametrize(("implementation", "chunk"), [*FORMS[:2], *FORMS[3:]])
@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_tokens_stay_close_to_the_definition(implementation, chunk, mode):
    case = dataclasses.replace(WIDE, mode=mode)
    check(case, "bfloat16", quick, implementation=implementation, chunk=chunk)


@each
@pytest.mark.parametrize(
    "tokens", [1, pytest.param(15, marks=pytest.mark.slow), 16, 17, 100]
)
def test_any_number_of_tokens_is_correct(implementation, chunk, tokens):
    case = dataclasses.replace(WIDE, tokens=tokens, mode="fast")
    check(case, "float32", quick, implementation=implementation, chunk=chunk)


@each
def test_zero_removal_and_a_large_state_are_correct(implementation, chunk):
    inputs, state, dy, dend = data(WIDE)
    zeros = jnp.zeros_like(inputs[4])
    arguments = ((*inputs[:4], zeros, zeros), 1e4 * state, dy, dend)
    y, end, grads = both(*arguments, implementation=implementation, chunk=chunk)
    true_y, true_end, true_grads = wkv_reference.both(*arguments)
    assert_close(y, true_y, WKV["float32"]["y"], "y")
    assert_close(end, true_end, WKV["float32"]["state"], "end")
    for name, grad, true in zip(NAMES, grads, true_grads, strict=True):
        assert_close(grad, true, WKV["float32"]["gradient"], f"gradient of {name}")


@each
@pytest.mark.parametrize("cut", [1, 3, 16, 18])
def test_cutting_the_sequence_changes_nothing(implementation, chunk, cut):
    inputs, state, *_ = data(dataclasses.replace(WIDE, tokens=19, mode="slow"))
    run = functools.partial(forward, implementation=implementation, chunk=chunk)
    y, end = run(inputs, state)
    left, middle = run(tuple(x[:, :cut] for x in inputs), state)
    right, last = run(tuple(x[:, cut:] for x in inputs), middle)
    assert_close(jnp.concatenate([left, right], axis=1), y, SAME["op"], "y")
    assert_close(last, end, SAME["op"], "end")


@each
def test_cutting_the_sequence_changes_no_gradient(implementation, chunk):
    inputs, state, dy, dend = data(dataclasses.replace(WIDE, tokens=19))
    run = functools.partial(quick, implementation=implementation, chunk=chunk)
    *_, uncut = run(inputs, state, dy, dend)
    left, right = (
        tuple(x[:, part] for x in inputs) for part in (slice(3), slice(3, None))
    )
    _, middle, _ = run(left, state, dy[:, :3], dend)
    *_, (*late, dmiddle) = run(right, middle, dy[:, 3:], dend)
    *_, (*early, dstate) = run(left, state, dy[:, :3], dmiddle)
    for name, first, second, grad in zip(NAMES, early, late, uncut, strict=False):
        joined = jnp.concatenate([first, second], axis=1)
        assert_close(joined, grad, WKV["float32"]["gradient"], f"gradient of {name}")
    assert_close(dstate, uncut[-1], WKV["float32"]["gradient"], "gradient of state")


@each
def test_rows_of_a_batch_are_independent(implementation, chunk):
    arguments = data(WIDE)
    other = jax.tree.map(lambda x: x.at[1].multiply(-0.5), arguments)
    run = functools.partial(both, implementation=implementation, chunk=chunk)
    for left, right in zip(
        *(jax.tree.leaves(run(*x)) for x in (arguments, other)), strict=True
    ):
        np.testing.assert_array_equal(left[0], right[0])


@each
def test_the_op_is_causal(implementation, chunk):
    inputs, state, *_ = data(WIDE)
    later = tuple(x.at[:, 40:].multiply(0.5) for x in inputs)
    run = functools.partial(forward, implementation=implementation, chunk=chunk)
    y, end = run(inputs, state)
    same, other = run(later, state)
    assert_close(same[:, :40], y[:, :40], SAME["op"], "y")
    assert not np.allclose(end, other)


@each
def test_the_op_is_linear_in_state_and_values(implementation, chunk):
    (r, log_w, k, v, a, b), state, *_ = data(WIDE)
    # A second pair of values and start state.
    u = v[::-1, ::-1]
    start = state[::-1]
    run = functools.partial(forward, implementation=implementation, chunk=chunk)
    first = run((r, log_w, k, v, a, b), state)
    second = run((r, log_w, k, u, a, b), start)
    mixed = run((r, log_w, k, 2 * v - 3 * u, a, b), 2 * state - 3 * start)
    for name, left, right, both_ in zip(
        ("y", "end"), first, second, mixed, strict=True
    ):
        assert_close(both_, 2 * left - 3 * right, SAME["op"], name)


@each
def test_without_tokens_the_state_is_returned_with_its_gradient(implementation, chunk):
    inputs, state, dy, dend = data(dataclasses.replace(WIDE, tokens=0))
    y, end, grads = quick(
        inputs, state, dy, dend, implementation=implementation, chunk=chunk
    )
    assert y.shape == (2, 0, 2, 64)
    np.testing.assert_array_equal(end, state)
    np.testing.assert_array_equal(grads[-1], dend)
    assert all(grad.shape == x.shape for grad, x in zip(grads, inputs, strict=False))


@each
def test_long_repetition_of_one_key_stays_finite(implementation, chunk):
    inputs, state, dy, dend = data(
        dataclasses.replace(WIDE, tokens=128, mode="repeated")
    )
    inputs, dy = jax.tree.map(lambda x: jnp.tile(x, (1, 4, 1, 1)), (inputs, dy))
    # The longest chunk that each takes, in which repetition adds up most.
    longest = 32 if implementation in ("pallas_gpu", "triton") else 64
    outputs = quick(
        inputs, state, dy, dend, implementation=implementation, chunk=longest
    )
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(outputs))


@each
def test_vmap_equals_a_larger_batch(implementation, chunk):
    arguments = data(WIDE)
    run = functools.partial(quick, implementation=implementation, chunk=chunk)
    mapped = jax.vmap(run)(*jax.tree.map(lambda x: x[:, None], arguments))
    for left, right in zip(
        jax.tree.leaves(mapped), jax.tree.leaves(run(*arguments)), strict=True
    ):
        assert_close(left[:, 0], right, SAME["op"])
