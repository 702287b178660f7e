"""float32 products on tensor cores, of three TF32 ones: the errors of the op that they leave."""

import jax
import jax.numpy as jnp
import pytest
from tolerances import WKV, assert_close, relative_error

from pallas_kernels import chunk_math, chunked
from pallas_kernels.cases import MODES, Case, make_inputs

KINDS = {"y": "y", "end": "state"}
# Next to IEEE products; the largest was 1.6, for the last state, whose error is 1e-7.
RATIO = 2.0


def tf32(x):
    """Round float32 to 10 bits after the point, ties away from zero, as `cvt.rna.tf32` does."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + jnp.uint32(1 << 12)) & jnp.uint32(0xFFFFE000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def three_tf32(x, y, arithmetic, *, left=1, right=0):
    """Stand in for `chunk_math.dot` as GPUs compute it for float32 operands."""
    x = x if left else x.mT
    y = y.mT if right else y
    high_x, high_y = tf32(x), tf32(y)
    low_x, low_y = tf32(x - high_x), tf32(y - high_y)
    small = jnp.matmul(low_x, high_y) + jnp.matmul(high_x, low_y)
    return small + jnp.matmul(high_x, high_y)


def passes(case, dtype, chunk):
    """The op's results and gradients by chunks, with numbers of a dtype."""
    inputs, state = make_inputs(case)
    dy = jax.random.normal(jax.random.key(9), inputs.v.shape, jnp.float32)
    arrays = jax.tree.map(
        lambda x: x.astype(dtype), (inputs, state, dy, 0.1 * state[..., ::-1])
    )

    def run(inputs, state, dy, dend):
        y, end, starts = chunked.forward_saving(inputs, state, chunk=chunk)
        grads, dstate = chunked.backward(inputs, starts, dy, dend, chunk=chunk)
        return {"y": y, "end": end, "state": dstate, **grads._asdict()}

    return jax.jit(run)(*arrays)


@pytest.mark.parametrize("mode", MODES)
def test_errors_match_those_of_ieee_products(monkeypatch, mode):
    case = Case(1, 133, 2, key_size=32, value_size=64, mode=mode)
    with jax.enable_x64(True):
        exact = passes(case, "float64", 16)
        ieee = passes(case, "float32", 16)
        monkeypatch.setattr(chunk_math, "dot", three_tf32)
        found = passes(case, "float32", 16)
    for name, value in exact.items():
        error = relative_error(found[name], value)
        assert error <= RATIO * relative_error(ieee[name], value) + 1e-8, name
        assert_close(
            found[name], value, WKV["float32"][KINDS.get(name, "gradient")], name
        )
        # Gradients of a and b with repeated keys are the only ones beyond, IEEE's too.
        if mode != "repeated":
            assert error <= 2e-6, name


def test_a_single_tf32_product_exceeds_the_tolerance(monkeypatch):
    case = Case(1, 133, 2, key_size=32, value_size=64)
    with jax.enable_x64(True):
        exact = passes(case, "float64", 16)
        monkeypatch.setattr(
            chunk_math,
            "dot",
            lambda x, y, arithmetic, *, left=1, right=0: jnp.matmul(
                tf32(x if left else x.mT), tf32(y.mT if right else y)
            ),
        )
        found = passes(case, "float32", 16)
    assert relative_error(found["y"], exact["y"]) > 1e-4
