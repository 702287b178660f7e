"""Matrices, their inputs' covariances, and decorrelated updates of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rwkv7_jax.optim.decorrelation import decorrelate

HEADS = (2, 1, 3)
N = 4
M = 6
LEAF = (*HEADS, N, M)
SQUARE = (*HEADS, M, M)


def noise(seed, shape, dtype=jnp.float32):
    """Normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def covariance(seed, condition=100.0, heads=HEADS, size=M):
    """Covariances with this condition number, their eigenvectors random and their scales unlike."""
    draw = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(draw.normal(size=(*heads, size, size)))
    values = np.geomspace(1.0, 1.0 / condition, size) * draw.uniform(
        1, 50, size=(*heads, 1)
    )
    return jnp.asarray(
        np.einsum("...ij,...j,...kj->...ik", basis, values, basis), jnp.float32
    )


EYE = jnp.broadcast_to(jnp.eye(M), SQUARE)


def skewed(seed):
    """Well-conditioned matrices that are not symmetric."""
    return EYE + 0.3 * noise(seed, SQUARE)


def normalised(c):
    """C M / tr C in float64."""
    c = np.asarray(c, np.float64)
    return c * c.shape[-1] / np.trace(c, axis1=-2, axis2=-1)[..., None, None]


@functools.cache
def compiled(tx):
    """One update; transforms that tests share are compiled once."""
    return jax.jit(lambda g, s, p, c: tx.update(g, s, p, stats=c))


def run(tx, params, updates):
    """The parameters and the optimizer's state after a list of (gradient, statistics)."""
    step = compiled(tx)
    state = tx.init(params)
    for grads, stats in updates:
        moves, state = step(grads, state, params, stats)
        params = optax.apply_updates(params, moves)
    return params, state


def learn(stats, count=1, start=None, **settings):
    """R after `count` updates with these statistics."""
    tx = decorrelate(optax.sgd(1.0), **settings)
    state = tx.init(jnp.zeros((*stats.shape[:-2], N, stats.shape[-1])))
    state = state if start is None else state._replace(whitener=start)
    grads = jnp.zeros((*stats.shape[:-2], N, stats.shape[-1]))

    def body(state, _):
        return tx.update(grads, state, stats=stats)[1], None

    return jax.jit(lambda state: jax.lax.scan(body, state, None, length=count)[0])(
        state
    ).whitener


def whitened(whitener, target):
    """R C R^T in float64."""
    r = np.asarray(whitener, np.float64)
    return r @ np.asarray(target, np.float64) @ r.swapaxes(-1, -2)


def identical(actual, expected):
    """Whether two trees are equal, bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), actual, expected
    )
    return all(jax.tree.leaves(same))


PARAMS = {"s": noise(0, LEAF), "w": noise(1, (3, 5)), "b": noise(2, (5,))}
GRADS = jax.tree.map(jnp.sin, PARAMS)
STATS = {"s": covariance(0), "w": None, "b": None}
ADAM = optax.scale_by_adam()
