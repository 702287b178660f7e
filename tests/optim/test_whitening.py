"""Closed forms: the inverse square root of a covariance, and its effective rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decorrelation_problems import M, covariance, normalised, whitened
from tolerances import FORMULA, assert_close

from rwkv7_jax.optim.whitening import effective_rank, whitening


@pytest.mark.parametrize(
    ("size", "condition", "bar"), [(6, 1e3, 1e-4), (256, 1e5, 1e-2)]
)
def test_whitening_matches_the_inverse_square_root_by_eigh_in_float64(
    size, condition, bar
):
    c = covariance(0, condition, heads=(), size=size)
    r = np.asarray(jax.jit(lambda c: whitening(c, 0.0))(c), np.float64)
    values, basis = np.linalg.eigh(normalised(c))
    assert_close(r, (basis * values**-0.5) @ basis.T, bar)
    assert np.linalg.norm(whitened(r, normalised(c)) - np.eye(size), 2) < bar
    assert np.array_equal(r, r.T)


def test_damping_is_relative_to_the_mean_eigenvalue_or_absolute():
    c = np.asarray(covariance(0), np.float64)
    for normalise, base in ((True, normalised(c)), (False, c)):
        r = whitening(np.float32(c), 0.5, normalise=normalise)
        assert np.max(np.abs(whitened(r, base + 0.5 * np.eye(M)) - np.eye(M))) < 1e-4


def test_whitening_zeros_is_the_identity_and_a_bad_matrix_gives_only_its_own_nan():
    good = covariance(0, heads=())
    c = jnp.stack([good, 0 * good, -good, good.at[1, 2].set(jnp.nan)])
    r = whitening(c)
    assert_close(r[0], whitening(good), FORMULA)
    assert np.array_equal(r[1], np.eye(M))
    assert np.all(np.isnan(r[2:]))


def test_the_effective_rank_counts_directions():
    c = np.zeros((4, M, M), np.float32)
    c[0] = 3 * np.eye(M)
    c[1, :2, :2] = np.eye(2)
    c[2] = np.ones((M, M))
    assert_close(effective_rank(c), [M, 2, 1, 0], FORMULA)
    assert_close(effective_rank(1e-25 * c[:1]), [M], FORMULA)


@pytest.mark.parametrize("scale", [2e38, 1e-37])
def test_whitening_does_not_depend_on_the_scale(scale):
    c = np.float32(scale) * np.eye(M, dtype=np.float32)
    assert_close(whitening(c), whitening(np.eye(M, dtype=np.float32)), FORMULA)
    assert_close(effective_rank(c), M, FORMULA)
