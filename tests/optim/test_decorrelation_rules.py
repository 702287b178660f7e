"""How R follows the statistics, and where it settles."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decorrelation_problems import (
    EYE,
    HEADS,
    LEAF,
    SQUARE,
    M,
    covariance,
    learn,
    noise,
    normalised,
    run,
    skewed,
    whitened,
)
from tolerances import FORMULA, assert_close

from rwkv7_jax.optim.decorrelation import MODES, decorrelate
from rwkv7_jax.optim.whitening import whitening


def published(r, c, rate, kappa, *, columns=False):
    """One step as the paper has it, in float64; `columns` is the slip in the authors' program."""
    z = r @ c @ r.T
    v = np.diag(z) - 1
    off = z - np.diag(np.diag(z))
    return r - rate * (
        (1 - kappa) * off @ r + kappa * (r * v if columns else np.diag(v) @ r)
    )


@pytest.mark.parametrize("kappa", [0.0, 0.3])
def test_the_online_rule_is_the_published_one(kappa):
    start = skewed(0)
    c = jnp.asarray(normalised(covariance(1)), jnp.float32)
    plain = {
        "iterations": 1,
        "damping": 0,
        "average": 0,
        "clip": None,
        "normalise": False,
    }
    actual = learn(c, count=2, start=start, rate=0.1, balance=kappa, **plain)
    for columns in (False, True):
        expected = np.asarray(start, np.float64)
        for _ in range(2):
            expected = np.stack(
                [
                    published(r, np.asarray(q, np.float64), 0.1, kappa, columns=columns)
                    for r, q in zip(
                        expected.reshape(-1, M, M), c.reshape(-1, M, M), strict=True
                    )
                ]
            ).reshape(SQUARE)
        if not columns:
            assert_close(actual, expected, FORMULA)
        elif kappa > 0:
            assert np.max(np.abs(actual - expected)) > 1e-2


def test_iterations_repeat_the_rule_with_one_covariance():
    c = covariance(0)
    thrice = learn(c, count=3, iterations=1)
    assert_close(learn(c, count=1, iterations=3), thrice, FORMULA)
    assert np.max(np.abs(learn(c, count=1, iterations=1) - thrice)) > 1e-2


@pytest.mark.parametrize("three", [3.0, np.float32(3), jnp.float32(3)])
def test_a_whole_number_of_iterations_may_be_a_float(three):
    c = covariance(0)
    wanted = learn(c, count=1, iterations=3)
    np.testing.assert_array_equal(learn(c, count=1, iterations=three), wanted)


def test_a_step_of_the_online_rule_is_clipped():
    settings = {"iterations": 1, "normalise": False, "damping": 0.0}
    move = EYE - learn(100 * covariance(0), clip=0.5, **settings)
    assert_close(np.linalg.norm(move, axis=(-2, -1)), np.full(HEADS, 0.5), 1e-5)
    short, free = (
        learn(1e-3 * covariance(0), clip=clip, **settings) for clip in (0.5, None)
    )
    assert_close(short, free, FORMULA)


def test_the_online_rule_converges_to_decorrelated_outputs():
    c = covariance(0)
    target = normalised(c) + 1e-4 * np.eye(M)
    assert np.max(np.abs(whitened(learn(c, count=100), target) - np.eye(M))) < 0.01
    assert np.max(np.abs(whitened(learn(c, count=1), target) - np.eye(M))) > 0.3


@pytest.mark.parametrize("mode", ["exact", "whiten"])
def test_the_closed_forms_need_one_step_and_ignore_the_scale(mode):
    c = covariance(0)
    scale = jnp.asarray([1e-12, 1e-6, 1.0, 10.0, 1e6, 1e12]).reshape(*HEADS, 1, 1)
    error = whitened(
        learn(scale * c, mode=mode), normalised(c) + 1e-4 * np.eye(M)
    ) - np.eye(M)
    assert np.max(np.abs(error)) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_an_isotropic_covariance_leaves_r_at_the_identity(mode):
    c = 7.0 * EYE
    r = learn(c, count=5, mode=mode, damping=0.0)
    assert_close(r, EYE, FORMULA)


def test_damping_bounds_directions_without_inputs():
    x = noise(0, (2, M, 2))
    c = jnp.einsum("hmi,hki->hmk", x, x)
    damped = np.linalg.norm(learn(c, count=2000, damping=1e-3), 2, axis=(-2, -1))
    assert np.all(damped <= 1.01 * 1e-3**-0.5), damped
    assert np.all(damped > 0.9 * 1e-3**-0.5), damped
    free = np.linalg.norm(learn(c, count=100, damping=0.0), 2, axis=(-2, -1))
    assert np.all(free > 1e4), free


def test_exact_recomputes_r_periodically_and_whiten_once():
    first = covariance(0)
    second = covariance(1)
    grads = jnp.zeros(LEAF)
    updates = [(grads, first), (grads, None), (grads, second), (grads, second)]
    exact = decorrelate(
        optax.sgd(1.0), mode="exact", damping=1e-3, every=3, average=0.0
    )
    before, after = (
        run(exact, grads, updates + more)[1] for more in ([], [(grads, second)])
    )
    assert_close(before.whitener, whitening(first), FORMULA)
    assert_close(after.whitener, whitening(second), FORMULA)
    assert np.array_equal(after.count, np.full(HEADS, 4))
    once = decorrelate(optax.sgd(1.0), mode="whiten", damping=1e-3, average=0.0)
    assert_close(run(once, grads, updates * 3)[1].whitener, whitening(first), FORMULA)


def test_the_average_starts_with_the_first_statistics():
    seen = [covariance(i) for i in range(3)]
    grads = jnp.zeros(LEAF)
    _, state = run(
        decorrelate(optax.sgd(1.0), average=0.8), grads, [(grads, c) for c in seen]
    )
    a, b, c = (np.asarray(x, np.float64) for x in seen)
    assert_close(state.covariance, 0.8 * (0.8 * a + 0.2 * b) + 0.2 * c, FORMULA)
