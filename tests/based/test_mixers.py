"""The convolution and the window against their definitions in numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close

from rwkv7_jax.based.mixers import (
    root_mean_square_norm,
    short_convolution,
    window_attention,
)
from rwkv7_jax.based.state import ConvMemory, WindowMemory

B, H, N, WIDTH = 2, 2, 3, 6

window = jax.jit(window_attention)
convolve = jax.jit(short_convolution)


@pytest.fixture(autouse=True)
def x64():
    """Everything in float64."""
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    """Normal numbers."""
    return np.random.default_rng(seed).normal(size=shape)


def ring(slots):
    """A window that has read nothing."""
    empty = jnp.zeros((B, slots, H, N))
    return WindowMemory(empty, empty, jnp.zeros(B, jnp.int32))


def windowed_softmax(q, k, v, slots):
    """The definition, token by token."""
    y = np.zeros_like(v)
    for t in range(q.shape[1]):
        seen = slice(max(0, t - slots + 1), t + 1)
        scores = np.einsum("bhn,bshn->bhs", q[:, t], k[:, seen]) / np.sqrt(N)
        weights = np.exp(scores)
        weights /= weights.sum(-1, keepdims=True)
        y[:, t] = np.einsum("bhs,bshn->bhn", weights, v[:, seen])
    return y


def test_the_norm_of_16_bit_activations_is_rounded_once():
    x = jnp.asarray(3 * draw(B, 5, 64), "bfloat16")
    weight = jnp.asarray(draw(64, seed=1), "float32")
    wide = np.float64(x)
    size = np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    found = root_mean_square_norm(x, weight, 1e-5)
    assert_close(found, wide / size * np.float64(weight), 2.0**-9)


# 150 tokens are three pieces of 64 for the small windows and one for the last.
@pytest.mark.parametrize("slots", [1, 5, 70, 150])
def test_a_window_covers_the_last_tokens_and_the_token_itself(slots):
    q, k, v = (draw(B, 150, H, N, seed=seed) for seed in range(3))
    y, _ = window(q, k, v, ring(slots), None)
    np.testing.assert_allclose(y, windowed_softmax(q, k, v, slots), atol=1e-12)


@pytest.mark.parametrize("cuts", [(0, 7, 7, 80, 81, 82, 150), range(151)])
def test_windowed_attention_in_pieces_matches_one_pass(cuts):
    q, k, v = (draw(B, 150, H, N, seed=seed) for seed in range(3))
    memory = ring(5)
    parts = []
    for begin, end in itertools.pairwise(cuts):
        now = slice(begin, end)
        y, memory = window(q[:, now], k[:, now], v[:, now], memory, None)
        parts.append(y)
    whole, wanted = window(q, k, v, ring(5), None)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, memory, wanted)


def test_rows_of_different_lengths_continue_where_they_end():
    q, k, v = (draw(B, 90, H, N, seed=seed) for seed in range(3))
    lengths = np.array([3, 71])
    _, memory = window(q, k, v, ring(5), lengths)
    later = [draw(B, 9, H, N, seed=seed) for seed in (5, 6, 7)]
    y, _ = window(*later, memory, None)
    for row, length in enumerate(lengths):
        joined = [
            np.concatenate([x[row : row + 1, :length], z[row : row + 1]], 1)
            for x, z in zip((q, k, v), later, strict=True)
        ]
        wanted = windowed_softmax(*joined, 5)[:, length:]
        np.testing.assert_allclose(y[row : row + 1], wanted, atol=1e-12)


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_the_convolution_is_causal_and_each_channel_has_its_own_taps(taps):
    x = draw(B, 20, WIDTH)
    weights = draw(taps, WIDTH, seed=1)
    bias = draw(WIDTH, seed=2)
    before = draw(B, taps - 1, WIDTH, seed=3)
    y, memory = convolve(x, weights, bias, ConvMemory(before), None)
    wanted = np.zeros_like(x)
    seen = np.concatenate([before, x], 1)
    for t in range(20):
        for i in range(taps):
            wanted[:, t] += weights[taps - 1 - i] * seen[:, taps - 1 + t - i]
    np.testing.assert_allclose(y, wanted + bias, atol=1e-12)
    np.testing.assert_array_equal(memory.inputs, seen[:, 20:])


def test_the_convolution_state_holds_the_last_valid_tokens():
    x = draw(B, 20, WIDTH)
    before = draw(B, 3, WIDTH, seed=3)
    taps = draw(4, WIDTH)
    lengths = np.array([1, 9])
    _, memory = convolve(x, taps, taps[0], ConvMemory(before), lengths)
    np.testing.assert_array_equal(memory.inputs[0, :2], before[0, 1:])
    np.testing.assert_array_equal(memory.inputs[0, 2], x[0, 0])
    np.testing.assert_array_equal(memory.inputs[1], x[1, 6:9])
