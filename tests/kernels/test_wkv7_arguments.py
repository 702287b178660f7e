"""Arguments of the op: choice of implementation, messages, no second compilation."""

import functools

import abstract_devices
import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import pytest
from tolerances import SAME, assert_close
from wkv_inputs import INPUTS, STATE, each, op

import pallas_kernels
from pallas_kernels import tiles
from pallas_kernels.cases import Case, make_inputs
from pallas_kernels.reference import NAMES


def primitives(jaxpr):
    """Yields every equation of `jaxpr` and of those inside it, as (name, parameters)."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, equation.params
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from primitives(inner)


def witness(implementation, differentiated):
    """Returns whether there are products between tokens, the lengths of loops, and the kernels."""
    run = functools.partial(op, implementation=implementation)
    if differentiated:
        run = jax.grad(lambda *x: jnp.sum(op(*x, implementation=implementation)[0]))
    has_xor = False
    loops = set()
    kernels = set()
    for name, parameters in primitives(jax.make_jaxpr(run)(INPUTS, STATE).jaxpr):
        # Only the inverse of a product between tokens uses this operation.
        has_xor |= name == "xor"
        if name == "scan":
            loops.add(parameters["length"])
        if name == "pallas_call":
            kernels.add(parameters["name"].removeprefix("wkv7_"))
    return has_xor, loops, kernels


def test_the_implementation_asked_for_is_the_one_that_runs():
    assert witness("scan", differentiated=False) == (False, {21}, set())
    assert witness("chunked", differentiated=False) == (True, {2}, set())
    assert witness("scan", differentiated=True) == (False, {2, 16}, set())
    assert witness("chunked", differentiated=True) == (True, {2}, set())
    assert witness("pallas_tpu", differentiated=False)[2] == {"forward_kernel"}
    assert witness("pallas_tpu", differentiated=True)[2] == {
        "forward_kernel",
        "backward_kernel",
    }
    assert witness("pallas_gpu", differentiated=False)[2] == {"forward_kernel"}
    kernels = {"forward_kernel", "state_kernel", "gradients_kernel"}
    assert witness("pallas_gpu", differentiated=True)[2] == kernels


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu", "triton"])
def test_a_named_kernel_on_the_wrong_device_names_the_right_one(
    unchecked, implementation
):
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
        (
            "pallas_tpu",
            Case(1, 4, 1, 48, 64),
            "head sizes that are multiples of 32 up to 256",
        ),
        (
            "pallas_gpu",
            Case(1, 4, 1, 48, 64),
            "head sizes that are powers of two from 16",
        ),
        (
            "pallas_gpu",
            Case(1, 4, 1, 256, 256),
            "head sizes that are powers of two from 16",
        ),
    ],
)
def test_a_named_kernel_lists_the_head_sizes_that_it_supports(
    unchecked, implementation, case, sentence
):
    inputs, state = make_inputs(case)
    with pytest.raises(
        NotImplementedError, match=f"wkv7: {implementation!r} takes {sentence}"
    ):
        pallas_kernels.wkv7(
            *inputs, state, implementation=implementation, interpret=True
        )


def test_large_heads_are_rejected_on_a_gpu_with_too_few_registers(
    unchecked, monkeypatch
):
    inputs, state = make_inputs(Case(1, 4, 1, 256, 64))
    monkeypatch.setattr(tiles, "capability", lambda: 80)
    with (
        jax.sharding.use_abstract_mesh(abstract_devices.mesh("gpu")),
        pytest.raises(
            NotImplementedError, match=r"up to 128 on this GPU; got \(256, 64\)"
        ),
    ):
        pallas_kernels.wkv7(*inputs, state, implementation="pallas_gpu")


def test_kernels_reject_float16(unchecked):
    inputs = tuple(x.astype("float16") for x in INPUTS)
    with pytest.raises(
        NotImplementedError, match="bfloat16 or float32 tokens and a float32 state"
    ):
        pallas_kernels.wkv7(*inputs, STATE, implementation="pallas_tpu", interpret=True)


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
        (
            {"chunk": 24},
            ValueError,
            "wkv7: `chunk` must be None or one of (16, 32, 64); got 24.",
        ),
        (
            {"k": INPUTS[2][:, :5]},
            ValueError,
            "wkv7: `k` must have shape (3, 21, 2, 32) to fit `r`; got (3, 5, 2, 32).",
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
def test_a_wrong_argument_is_named_in_one_sentence(unchecked, change, error, sentence):
    arguments = dict(zip(NAMES, INPUTS, strict=True))
    with pytest.raises(error) as caught:
        pallas_kernels.wkv7(**(arguments | {"state": STATE} | change))
    assert str(caught.value) == sentence


def with_decay(log_w):
    """Returns the inputs with this logarithm of the decay at every place."""
    return tuple(
        jnp.full_like(x, log_w) if name == "log_w" else x
        for name, x in zip(NAMES, INPUTS, strict=True)
    )


@pytest.mark.parametrize("log_w", [-5.0, -20.0, -69.0])
def test_a_decay_that_overflows_in_chunks_is_rejected_or_left_to_scan(log_w):
    inputs = with_decay(log_w)
    expected = op(inputs, STATE, implementation="scan")
    for left, right in zip(op(inputs, STATE), expected, strict=True):
        assert_close(left, right, SAME["op"])
    with pytest.raises(ValueError, match="wkv7: `log_w` must sum up to at most 80"):
        op(inputs, STATE, implementation="chunked", chunk=64)


def test_a_chunk_may_hold_a_token_that_erases_the_state():
    sharp = INPUTS[1].at[:, 9].set(-69.0)
    inputs = (INPUTS[0], sharp, *INPUTS[2:])
    expected = op(inputs, STATE, implementation="scan")
    for left, right in zip(
        op(inputs, STATE, implementation="chunked"), expected, strict=True
    ):
        assert_close(left, right, SAME["op"])


@pytest.mark.parametrize("chunk", [32, 64])
def test_float16_tokens_are_rejected_in_long_chunks(chunk):
    inputs = tuple(x.astype("float16") for x in INPUTS)
    with pytest.raises(ValueError, match="`chunk` must be None or 16 for float16"):
        op(inputs, STATE, implementation="chunked", chunk=chunk)


EMPTY = {
    "no rows": Case(0, 21, 2, key_size=32, value_size=64),
    "no heads": Case(3, 21, 0, key_size=32, value_size=64),
    "no values": Case(3, 21, 2, key_size=32, value_size=0),
}


@each
@pytest.mark.parametrize("case", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("packed", [False, True])
def test_empty_arrays_give_empty_arrays(implementation, case, packed):
    shape = (case.batch, case.tokens, case.heads)
    keys = jnp.zeros((*shape, case.key_size))
    values = jnp.zeros((*shape, case.value_size))
    inputs = (keys, keys, keys, values, keys, keys)
    state = jnp.zeros((case.batch, case.heads, case.value_size, case.key_size))
    ids = jnp.zeros(shape[:2], jnp.int32) if packed else None

    def run(inputs, state):
        return op(inputs, state, implementation=implementation, segment_ids=ids)

    (y, end), pull = jax.vjp(run, inputs, state)
    assert y.shape == values.shape
    assert end.shape == state.shape
    assert [x.shape for x in jax.tree.leaves(pull((y, end)))] == [
        *(x.shape for x in inputs),
        state.shape,
    ]


def test_tokens_in_float64_need_a_state_in_float64(unchecked):
    with jax.enable_x64(True):
        wide = [x.astype("float64") for x in INPUTS]
        with pytest.raises(TypeError, match="`state` must be float64 where `r` is"):
            pallas_kernels.wkv7(*wide, STATE)
        # The decay is best kept wide.
        decay = (INPUTS[0], wide[1], *INPUTS[2:])
        y, _ = op(decay, STATE, implementation="chunked")
        assert_close(y, op(INPUTS, STATE, implementation="chunked")[0], SAME["op"])


def test_float16_products_accumulate_in_float32():
    inputs, state = make_inputs(Case(2, 40, 2, 16, 16))
    inputs = [x.astype("float16") for x in inputs]
    # Values whose sums over keys are above 65,504, the largest number of float16.
    inputs[3] = 300 * inputs[3]
    found = op(inputs, 300 * state, implementation="chunked")
    wanted = op(inputs, 300 * state, implementation="scan")
    for left, right in zip(found, wanted, strict=True):
        assert_close(left, right, 2e-3)
