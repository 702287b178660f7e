"""Frozen weights in 8 bits: the rounding, the model that they make, and its gradients."""

import dataclasses
import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from hypothesis.extra import numpy as arrays
from tolerances import SAME, assert_close

from rwkv7_jax.model.int8_weights import (
    Int8Matrix,
    dequantize,
    is_int8,
    quantize,
    quantize_rows,
)
from rwkv7_jax.model.remat import CHOICES
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.training.costs import parameter_count, training_memory
from rwkv7_jax.tuning.state_tuning import state_loss

CONFIG = tiny_models.SCANNED

QUANTIZED = {
    "head/weight",
    *(
        f"{part}/{name}/weight"
        for part in ("layer_0", "layers")
        for name in (
            "att/receptance",
            "att/key",
            "att/value",
            "att/output",
            "ffn/key",
            "ffn/value",
        )
    ),
}

MATRICES = arrays.arrays(
    np.float32,
    # A few shapes: each is compiled.
    st.sampled_from([(1, 1), (1, 6), (5, 1), (4, 3), (1, 3, 2), (3, 1, 4), (2, 5, 6)]),
    # XLA counts a subnormal number as 0 on a CPU, in any product.
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
)


@pytest.fixture(scope="module")
def weights():
    """Random weights as floats, in 8 bits, and as the floats that those integers stand for."""
    params = tiny_models.lively(CONFIG)
    # A row that a product must keep at zero.
    params = jax.tree.map(lambda leaf: leaf, params)
    params["head"] = {"weight": params["head"]["weight"].at[3].set(0.0)}
    in_int8 = quantize(params)
    return params, in_int8, dequantize(in_int8)


@functools.partial(jax.jit, static_argnames=("remat", "dtype"))
def gradient(params, state, batch, *, remat="none", dtype="float32"):
    """The gradient of the start state."""
    model = RWKV7(dataclasses.replace(CONFIG, remat=remat, dtype=dtype))
    return jax.grad(lambda state: state_loss(model, params)(state, batch)[0])(state)


def batch(rows=2, length=9):
    """Tokens that all count."""
    tokens = tiny_models.tokens(rows, length + 1, CONFIG)
    return {"tokens": tokens, "mask": jnp.ones((rows, length))}


@hypothesis.settings(max_examples=60)
@hypothesis.given(MATRICES)
def test_the_error_of_an_entry_is_at_most_half_a_step_of_its_row(matrix):
    found = quantize_rows(jnp.asarray(matrix))
    wide = np.asarray(found.scale, np.float64)[..., None]
    off = np.abs(np.asarray(found.values, np.float64) * wide - matrix)
    # The scale is rounded to float32 itself, which 127 steps multiply.
    assert (off <= wide * (0.5 + 1e-4)).all()
    largest = np.abs(matrix).max(axis=-1)
    assert (wide[..., 0] <= np.maximum(largest / 127 * (1 + 1e-6), 1.2e-38)).all()


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e30])
def test_the_largest_entry_of_a_row_maps_to_127(factor):
    matrix = factor * np.random.default_rng(0).normal(size=(3, 5, 7))
    found = quantize_rows(jnp.asarray(matrix, jnp.float32))
    assert (np.abs(np.asarray(found.values)).max(axis=-1) == 127).all()


def test_a_row_of_zeros_stays_zeros():
    found = quantize_rows(jnp.asarray([[0.0, 0.0], [1.0, -2.0]]))
    assert (np.asarray(found.dequantize())[0] == 0).all()
    assert (np.asarray(found.scale) > 0).all()


def test_a_row_quantizes_the_same_alone_and_in_a_stack():
    stack = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 6)), jnp.float32)
    whole = quantize_rows(stack)
    for layer in range(2):
        for row in range(4):
            one = quantize_rows(stack[layer, row][None])
            assert (one.values[0] == whole.values[layer, row]).all()
            assert one.scale[0] == whole.scale[layer, row]


def test_quantizing_dequantized_weights_changes_nothing(weights):
    _, in_int8, floats = weights
    again = quantize(floats)
    for found, was in zip(
        jax.tree.leaves(again, is_leaf=is_int8),
        jax.tree.leaves(in_int8, is_leaf=is_int8),
        strict=True,
    ):
        if is_int8(found):
            assert (found.values == was.values).all()


def test_only_the_head_and_the_projections_are_quantized(weights):
    params, in_int8, _ = weights
    found = set()
    paths = jax.tree_util.tree_leaves_with_path(in_int8, is_leaf=is_int8)
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if is_int8(leaf):
            found.add(name)
        else:
            was = functools.reduce(lambda tree, key: tree[key.key], path, params)
            assert leaf is was
    assert found == QUANTIZED


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_quantized_model_equals_the_dequantized_one(weights, dtype):
    _, in_int8, floats = weights
    model = RWKV7(dataclasses.replace(CONFIG, dtype=dtype))
    tokens = tiny_models.tokens(2, 11, CONFIG)
    start = tiny_models.random_state(model.config, 2)
    logits, end = model.apply({"params": in_int8}, tokens, start)
    expected, expected_end = model.apply({"params": floats}, tokens, start)
    bar = SAME["model"] if dtype == "float32" else 3e-2
    assert_close(logits, expected, bar, "logits")
    assert_close(end.wkv, expected_end.wkv, bar, "state")
    assert (np.asarray(logits)[..., 3] == 0).all()


def test_gradients_of_the_state_match_the_dequantized_model(weights):
    _, in_int8, floats = weights
    start = tiny_models.random_state(CONFIG)
    # Which does not depend on what its backward pass computes again.
    expected = gradient(floats, start, batch()).wkv
    assert np.abs(np.asarray(expected)).max() > 0
    for remat in CHOICES:
        found = gradient(in_int8, start, batch(), remat=remat).wkv
        assert_close(found, expected, SAME["gradient"], f"gradient with remat {remat}")


@pytest.mark.parametrize("remat", CHOICES)
def test_no_float_copy_of_all_weights_is_kept(weights, remat):
    params, in_int8, _ = weights
    start = tiny_models.random_state(CONFIG)
    choices = {"remat": remat, "dtype": "bfloat16"}
    text = gradient.lower(in_int8, start, batch(), **choices).compile().as_text()
    key = params["layers"]["ffn"]["key"]["weight"]
    stack = ",".join(map(str, key.shape))
    assert f"s8[{stack}]" in text
    kept = set(re.findall(rf"(?:f32|bf16)\[{stack}\]", text))
    assert not kept


def test_the_estimate_equals_the_bytes_in_memory(weights):
    _, in_int8, _ = weights
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(in_int8))
    count = parameter_count(CONFIG)

    def memory(weight_bytes):
        return training_memory(
            CONFIG, batch=1, length=8, trained="state", weight_bytes=weight_bytes
        )

    state = memory(4).parameters - 4 * count
    assert memory(held / count).parameters == held + state


def test_a_quantized_matrix_has_the_shape_that_flax_expects():
    matrix = quantize_rows(jnp.ones((2, 3)))
    assert isinstance(matrix, Int8Matrix)
    assert jax.tree.leaves(matrix)[0].shape == matrix.shape == (2, 3)


def test_the_outer_tree_of_variables_is_rejected():
    with pytest.raises(ValueError, match="quantize: `params` must be the inner tree"):
        quantize({"params": {}})
