"""Weighted sums, scaling, capacity and singular values of start states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, random_state
from upscaled_states import SIZE, empty_state, filled

from rwkv7_jax.model.state import init_state, repeat
from rwkv7_jax.tuning.state_arithmetic import (
    capacity,
    scaled,
    singular_values,
    weighted_sum,
)


@pytest.fixture(scope="module")
def empty():
    """Every test takes such states, so that all share the compiled programs."""
    return empty_state()


def equal(one, two):
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, two))


def test_a_mixture_of_one_state_is_that_state(empty):
    for state in (random_state(), filled(empty)):
        assert equal(weighted_sum([state], [1.0]), state)


def test_an_interpolation_ends_at_its_states(empty):
    one = filled(empty, 1)
    two = filled(empty, 2)
    assert equal(weighted_sum([one, two], [1.0, 0.0]), one) and equal(
        weighted_sum([one, two], [0.0, 1.0]), two
    )


def test_the_weights_of_a_mixture_can_be_learnt():
    one, two = (random_state(seed=seed) for seed in range(2))

    def total(weight):
        return jnp.sum(weighted_sum([one, two], [weight, 1 - weight]).wkv)

    slope = jax.jit(jax.grad(total))(0.25)
    np.testing.assert_allclose(slope, jnp.sum(one.wkv - two.wkv), rtol=1e-4)


def test_upscaled_states_can_be_mixed_under_jit(empty):
    states = [filled(empty, 1), filled(empty, 2)]
    weights = [0.25, 0.75]
    assert equal(jax.jit(weighted_sum)(states, weights), weighted_sum(states, weights))


def test_mixtures_are_linear():
    one, two, three = (random_state(seed=seed) for seed in range(3))
    at_once = weighted_sum([one, two, three], [0.5, -0.25, 2.0])
    nested = weighted_sum([weighted_sum([one, two], [1.0, -0.5]), three], [0.5, 2.0])
    for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(nested), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_a_scaled_state_is_a_mixture_of_one(empty):
    for state in (random_state(), filled(empty)):
        assert equal(weighted_sum([state], [0.3]), scaled(state, 0.3))


def test_memories_are_mixed_and_their_features_stay(empty):
    one = filled(empty, 1)
    two = filled(empty, 2)
    mixed = weighted_sum([one, two], [0.5, 0.5]).upscaled
    wanted = 0.5 * (one.upscaled.memory + two.upscaled.memory)
    np.testing.assert_allclose(mixed.memory, wanted, rtol=1e-6, atol=1e-7)
    assert equal(mixed.features, empty.upscaled.features)


def with_upscaled(state, **changes):
    return state.replace(upscaled=state.upscaled.replace(**changes))


def with_features(state, **changes):
    return with_upscaled(state, features=state.upscaled.features.replace(**changes))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda s: s.replace(upscaled=None),
            r"`states\[1\]` must have an upscaled memory if and",
        ),
        (
            lambda s: s.replace(wkv=s.wkv[:2]),
            r"`states\[1\].wkv` must have the shape of",
        ),
        (lambda s: repeat(s, 2), r"`states\[1\]` must hold one sequence; got 2"),
        (
            lambda s: with_upscaled(s, dynamics="decay"),
            r"dynamics` must be .*static; got decay",
        ),
        (
            lambda s: with_features(s, kind="fourier"),
            r"kind` must be .*gaussian; got fourier",
        ),
        (
            lambda s: with_features(s, landmarks=s.upscaled.features.landmarks + 1),
            r"`states\[1\].upscaled.features.landmarks` must equal states\[0\]'s; it differs",
        ),
        (
            lambda s: with_features(s, map=None),
            r"features.map` must equal states\[0\]'s",
        ),
        (
            lambda s: with_upscaled(s, memory=s.upscaled.memory[..., :-1]),
            r"`states\[1\].upscaled.memory` must be states\[0\]'s, \(3, 1, 2, 32, 24\)",
        ),
    ],
)
def test_states_of_different_shapes_are_named(empty, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        weighted_sum([empty, change(empty)], [0.5, 0.5])


@pytest.mark.parametrize(
    ("states", "weights", "sentence"),
    [
        (1, [], "got 0 weights and 1 states"),
        (0, [], "got 0 weights and 0 states"),
        (1, [float("nan")], "`weights` must be finite; got nan"),
    ],
)
def test_mixture_weights_are_finite_and_one_per_state(states, weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        weighted_sum([random_state()] * states, weights)


def test_capacity_counts_nonzero_leaves(empty):
    wkv = 3 * 2 * 32 * 32
    memory = 3 * 2 * 32 * SIZE
    assert (
        capacity(random_state()).trained == capacity(init_state(CONFIG)).trained == wkv
    )
    assert capacity(empty).trained == capacity(filled(empty)).trained == memory
    both = capacity(filled(empty).replace(wkv=random_state().wkv))
    assert (both.wkv, both.memory, both.trained) == (wkv, memory, wkv + memory)
    assert both.facts == ((wkv + memory) // 35, (wkv + memory) // 20)


def test_singular_values_are_sorted_for_each_layer_and_head():
    values = jnp.arange(32.0)
    wkv = jnp.zeros_like(init_state(CONFIG).wkv).at[1, 0, 1].set(jnp.diag(values))
    found = singular_values(wkv)
    assert found.shape == (3, 2, 32)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found[1, 1], values[::-1])
    assert not found[[0, 2]].any()
