"""The op's public door: lengths, choice of implementation, messages, other platforms."""

import functools

import abstract_devices
import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_devices import MARKS
from tolerances import SAME, assert_close

import pallas_kernels
from pallas_kernels import platforms, tiles
from pallas_kernels.cases import Case, make_inputs
from pallas_kernels.reference import NAMES

CASE = Case(3, 21, 2, key_size=32, value_size=64)
LENGTHS = (21, 9, 0)
INPUTS, STATE = make_inputs(CASE)
# Kernels run here in Pallas's interpreter; Triton's has tests of its own.
INTERPRETED = ("pallas_tpu", "pallas_gpu")
each = pytest.mark.parametrize("implementation", ("scan", "chunked", *INTERPRETED))


def op(inputs, state, *, implementation=None, **options):
    """The op on a tuple."""
    interpret = implementation in INTERPRETED
    options |= {"implementation": implementation, "interpret": interpret}
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
    """Whether tokens of a chunk meet in squares, the lengths of the loops, and the kernels."""
    run = functools.partial(op, implementation=implementation)
    if differentiated:
        run = jax.grad(lambda *x: jnp.sum(op(*x, implementation=implementation)[0]))
    found = list(primitives(jax.make_jaxpr(run)(INPUTS, STATE).jaxpr))
    loops = {parameters["length"] for name, parameters in found if name == "scan"}
    kernels = {
        parameters["name"].removeprefix("wkv7_")
        for name, parameters in found
        if name == "pallas_call"
    }
    return any(name == "xor" for name, _ in found), loops, kernels


def test_the_implementation_asked_for_is_the_one_that_runs():
    assert witness("scan", differentiated=False) == (False, {21}, set())
    assert witness("chunked", differentiated=False) == (True, {2}, set())
    assert witness("scan", differentiated=True) == (False, {2, 16}, set())
    assert witness("chunked", differentiated=True) == (True, {2}, set())
    assert witness("pallas_tpu", differentiated=False)[2] == {"forward_kernel"}
    assert witness("pallas_tpu", differentiated=True)[2] == {"forward_kernel", "backward_kernel"}
    assert witness("pallas_gpu", differentiated=False)[2] == {"forward_kernel"}
    kernels = {"forward_kernel", "state_kernel", "gradients_kernel"}
    assert witness("pallas_gpu", differentiated=True)[2] == kernels


# The products between the tokens of a chunk, per row and head, as XLA is given them.
SQUARES = "tensor<3x2x16x16xf32>"


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda", "rocm"])
def test_without_a_name_every_platform_gets_its_own_from_any_machine(platform):
    lowered = jax.jit(op).trace(INPUTS, STATE).lower(lowering_platforms=(platform,)).as_text()
    assert [name for name, mark in MARKS.items() if mark in lowered] == [
        name for name in MARKS if name == platform
    ]
    assert (SQUARES in lowered) == (platform == "rocm")


@pytest.mark.parametrize("case", [Case(1, 21, 2, 24, 40), Case(1, 1, 2)], ids=["sizes", "a token"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_what_no_kernel_can_or_should_serve_is_left_to_xla(platform, case):
    arguments = make_inputs(case)
    lowered = jax.jit(op).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert MARKS[platform] not in lowered


@pytest.mark.parametrize("implementation", [None, "kernel"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_gradient_is_lowered_for_a_device_that_is_not_here(platform, implementation):
    name = implementation and {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}[platform]

    def loss(inputs, state):
        return jnp.sum(pallas_kernels.wkv7(*inputs, state, implementation=name)[0])

    mesh = abstract_devices.mesh("gpu" if platform == "cuda" else platform)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(INPUTS, STATE)
        lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    assert lowered.count(MARKS[platform]) >= 2
    assert SQUARES not in lowered


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_program_for_an_accelerator_is_right_on_a_cpu_as_well(platform):
    def both(inputs, state):
        (y, end), pull = jax.vjp(op, inputs, state)
        return y, end, pull((jnp.sin(y), jnp.cos(end)))

    expected = jax.jit(both)(INPUTS, STATE)
    with jax.sharding.use_abstract_mesh(abstract_devices.mesh(platform)):
        traced = jax.jit(both).trace(INPUTS, STATE)
    found = traced.lower(lowering_platforms=("cpu",)).compile()(INPUTS, STATE)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(left, right, SAME["op"])


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_backward_pass_traced_elsewhere_fits_its_forward_pass(monkeypatch, platform):
    """As where `jax.default_device` has changed between the two."""
    with monkeypatch.context() as context:
        device = abstract_devices.mesh(platform).abstract_device
        context.setattr(platforms, "target", lambda: device)
        (y, end), pull = jax.vjp(op, INPUTS, STATE)
    cotangents = (jnp.sin(y), jnp.cos(end))
    expected = jax.vjp(op, INPUTS, STATE)[1](cotangents)
    for left, right in zip(*map(jax.tree.leaves, (pull(cotangents), expected)), strict=True):
        assert_close(left, right, SAME["op"])


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu", "triton"])
def test_a_kernel_by_name_says_where_it_runs(unchecked, implementation):
    platform = "tpu" if implementation == "pallas_tpu" else "cuda"
    with pytest.raises(NotImplementedError) as caught:
        pallas_kernels.wkv7(*INPUTS, STATE, implementation=implementation)
    assert str(caught.value) == (
        f"wkv7: {implementation!r} is made for {platform} devices, this program for cpu; name "
        f"another implementation or, to lower from here, set an abstract mesh of that device."
    )
    assert implementation not in pallas_kernels.available()


@pytest.mark.parametrize(
    ("implementation", "case", "sentence"),
    [
        ("pallas_tpu", Case(1, 4, 1, 48, 64), "head sizes that are multiples of 32 up to 256"),
        ("pallas_gpu", Case(1, 4, 1, 48, 64), "head sizes that are powers of two from 16"),
        ("pallas_gpu", Case(1, 4, 1, 256, 256), "head sizes that are powers of two from 16"),
    ],
)
def test_a_kernel_by_name_says_which_sizes_it_takes(unchecked, implementation, case, sentence):
    inputs, state = make_inputs(case)
    with pytest.raises(NotImplementedError, match=f"wkv7: {implementation!r} takes {sentence}"):
        pallas_kernels.wkv7(*inputs, state, implementation=implementation, interpret=True)


def test_large_heads_are_refused_on_a_gpu_that_has_too_few_registers(unchecked, monkeypatch):
    inputs, state = make_inputs(Case(1, 4, 1, 256, 64))
    monkeypatch.setattr(tiles, "capability", lambda: 80)
    with (
        jax.sharding.use_abstract_mesh(abstract_devices.mesh("gpu")),
        pytest.raises(NotImplementedError, match=r"up to 128 on this GPU; got \(256, 64\)"),
    ):
        pallas_kernels.wkv7(*inputs, state, implementation="pallas_gpu")


def test_half_precision_is_refused_by_kernels(unchecked):
    inputs = tuple(x.astype("float16") for x in INPUTS)
    with pytest.raises(NotImplementedError, match="bfloat16 or float32 tokens and a float32 state"):
        pallas_kernels.wkv7(*inputs, STATE, implementation="pallas_tpu", interpret=True)


def test_one_exported_program_serves_every_platform():
    # JAX promises nothing about how long this call's format will be read.
    allowed = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    platforms = ("cpu", "tpu", "cuda")
    export = jax.export.export(jax.jit(op), platforms=platforms, disabled_checks=[allowed])
    exported = export(INPUTS, STATE)
    assert all(mark in exported.mlir_module() for mark in MARKS.values())
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
            "wkv7: `implementation` must be None or one of scan, chunked, pallas_tpu, pallas_gpu, "
            "triton; got 'fast'.",
        ),
        ({"chunk": 24}, ValueError, "wkv7: `chunk` must be None or one of (16, 32, 64); got 24."),
        (
            {"k": INPUTS[2][:, :5]},
            ValueError,
            "wkv7: `k` must have shape (3, 21, 2, 32) beside `r`; got (3, 5, 2, 32).",
        ),
        (
            {"v": INPUTS[3][0]},
            ValueError,
            "wkv7: `v` must have shape [B T H N]; got (21, 2, 64).",
        ),
        (
            {"state": STATE.mT},
            ValueError,
            "wkv7: `state` must have shape [B H Nv Nk] = (3, 2, 64, 32); got (3, 2, 32, 64).",
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
