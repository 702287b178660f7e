"""The gates and norms of 16-bit activations are computed in float32."""

import jax.numpy as jnp
import numpy as np
from tolerances import FORMULA, assert_close

from rwkv7_jax.model import norms, pointwise

# Of a number that is rounded once to bfloat16.
ROUNDED = 2.0**-9
SHAPE = (2, 5, 64)


def draw(seed, *shape, dtype="bfloat16"):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(3 * values, dtype)


def gate(raw, bias):
    """The sigmoid of the biased logits in float64."""
    return 1 / (1 + np.exp(-(np.float64(raw) + np.float64(bias))))


RAW = draw(0, *SHAPE)
BIAS = draw(1, SHAPE[2], dtype="float32")
GATE = gate(RAW, BIAS)


def test_the_logarithm_of_the_decay_is_never_rounded():
    found = pointwise.log_decay(RAW, BIAS)
    assert found.dtype == jnp.float32
    assert_close(found, -np.exp(-0.5) * GATE, FORMULA)


def test_the_learning_rate_is_rounded_once():
    xi = jnp.ones((2, 32))
    *_, rate = pointwise.removal_and_replacement(RAW, RAW, BIAS, xi, BIAS)
    assert_close(np.float64(rate).reshape(SHAPE), GATE, ROUNDED)


def test_the_share_of_the_first_layers_values_is_rounded_once():
    zeros = jnp.zeros(SHAPE, "bfloat16")
    assert_close(pointwise.mix_values(zeros, zeros + 1, RAW, BIAS), GATE, ROUNDED)


def standardised(x, eps):
    """Zero mean and unit variance over the last axis, in float64."""
    x = np.float64(x)
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


# Far from zero, where sums of rounded numbers would lose the differences.
FAR = draw(2, *SHAPE) + 20


def test_a_layer_norm_is_rounded_once():
    found = norms.layer_norm(FAR, BIAS, 0 * BIAS, 1e-5)
    assert_close(found, standardised(FAR, 1e-5) * np.float64(BIAS), ROUNDED)


def test_the_norm_of_each_head_is_rounded_once():
    y = FAR.reshape(2, 5, 2, 32)
    found = norms.group_norm(y, BIAS, 0 * BIAS, 1e-3, head_size=32)
    expected = standardised(y, 1e-3) * np.float64(BIAS).reshape(2, 32)
    assert_close(found, expected, ROUNDED)


def test_a_removal_key_is_rounded_once():
    heads = np.float64(RAW).reshape(2, 5, 2, 32)
    length = np.linalg.norm(heads, axis=-1, keepdims=True)
    found = norms.unit_heads(RAW.reshape(heads.shape), 32)
    assert_close(found, heads / length, ROUNDED)
