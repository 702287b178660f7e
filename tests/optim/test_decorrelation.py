"""Decorrelated updates: their arithmetic, and missing or bad statistics."""

import jax
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
    N,
    covariance,
    identical,
    noise,
    run,
    skewed,
)
from tolerances import FORMULA, assert_close

from rwkv7_jax.optim.decorrelation import MODES, decorrelate
from rwkv7_jax.optim.whitening import whitening

ADAMW = optax.with_extra_args_support(optax.adamw(1e-2))


def test_sgd_on_s_equals_sgd_on_s_prime(momentum=0.9):
    """In numpy: y = S' R x, squared error, S' = S R^-1 trained by SGD."""
    r = skewed(0)
    x = noise(1, (*HEADS, M, 20))
    goal = noise(2, (*HEADS, N, 20))
    tx = decorrelate(optax.sgd(0.01, momentum))
    start = noise(3, LEAF)

    @jax.jit
    def step(s, state):
        grads = jax.grad(lambda s: 0.5 * jnp.sum(jnp.square(s @ x - goal)))(s)
        moves, state = tx.update(grads, state, s)
        return optax.apply_updates(s, moves), state

    s = start
    state = tx.init(start)._replace(whitener=r)
    r, x, goal = (np.asarray(a, np.float64) for a in (r, x, goal))
    prime = np.asarray(start, np.float64) @ np.linalg.inv(r)
    trace = 0.0
    for _ in range(5):
        s, state = step(s, state)
        z = r @ x
        trace = (prime @ z - goal) @ z.swapaxes(-1, -2) + momentum * trace
        prime = prime - 0.01 * trace
    assert_close(s, prime @ r, 1e-5)
    assert float(jnp.max(jnp.abs(s - start))) > 0.1


@pytest.mark.parametrize(
    ("settings", "dtype"), [({"rate": 0.0}, "float32"), ({"iterations": 0}, "bfloat16")]
)
def test_with_r_the_identity_it_is_the_inner_optimizer_bit_for_bit(settings, dtype):
    params = {"s": noise(0, LEAF, dtype), "b": noise(1, (5,), dtype)}
    grads = [jax.tree.map(lambda x, i=i: jnp.sin(x + i), params) for i in range(3)]
    stats = {"s": covariance(0), "b": None}
    inner = optax.adamw(1e-2)
    expected, inner_state = run(
        optax.with_extra_args_support(inner), params, [(g, None) for g in grads]
    )
    actual, state = run(
        decorrelate(ADAMW, **settings), params, [(g, stats) for g in grads]
    )
    assert identical(actual, expected)
    assert identical(state.inner, inner_state)


def test_a_new_r_does_not_move_the_parameters():
    params = noise(0, LEAF)
    after, state = run(
        decorrelate(optax.sgd(1.0)), params, [(0 * params, covariance(0))] * 2
    )
    assert identical(after, params)
    assert float(jnp.max(jnp.abs(state.whitener - EYE))) > 0.1


def test_the_gradient_is_rotated_by_the_r_that_its_own_statistics_updated():
    grads = noise(0, LEAF)
    stats = covariance(0)
    params, state = run(decorrelate(optax.sgd(1.0)), jnp.zeros(LEAF), [(grads, stats)])
    r = np.asarray(state.whitener, np.float64)
    assert_close(params, -np.asarray(grads) @ r.swapaxes(-1, -2) @ r, 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_updates_keep_the_gradients_dtype_and_r_and_c_are_float32(dtype):
    with jax.enable_x64(True):
        tx = decorrelate(optax.sgd(1.0))
        grads = noise(0, LEAF, dtype)
        stats = jnp.asarray(covariance(0), dtype)
        moves, state = jax.jit(lambda g, s: tx.update(g, s, stats=stats))(
            grads, tx.init(grads)
        )
        assert moves.dtype == dtype
        assert (state.covariance.dtype, state.whitener.dtype) == (
            jnp.float32,
            jnp.float32,
        )
        r = np.asarray(state.whitener, np.float64)
        exact = -np.asarray(grads, np.float64) @ r.swapaxes(-1, -2) @ r
        assert_close(moves, exact, 1e-2 if dtype == "bfloat16" else 1e-12)


def test_every_product_requests_full_precision():
    params = jnp.zeros(LEAF)
    for mode in MODES:
        tx = decorrelate(optax.sgd(1.0), mode=mode)
        update = lambda g, s, c, tx=tx: tx.update(g, s, stats=c)  # noqa: E731
        program = str(
            jax.make_jaxpr(update)(params, tx.init(params), jnp.zeros(SQUARE))
        )
        products = program.count("dot_general[")
        assert products >= 5
        assert (
            program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
            + program.count("precision=Precision.HIGHEST")
            == products
        )


def test_without_statistics_the_last_r_is_used():
    grads = {"s": noise(0, LEAF), "t": noise(1, (3, M))}
    tx = decorrelate(optax.sgd(1.0))
    stats = {"s": covariance(0), "t": None}
    _, state = run(tx, grads, [(grads, stats)])
    assert np.array_equal(state.whitener["t"], np.eye(M))
    for nothing in (None, {"s": None, "t": None}):
        moves, after = tx.update(grads, state, grads, stats=nothing)
        assert identical(after, state)
        r = np.asarray(state.whitener["s"], np.float64)
        assert_close(moves["s"], -np.asarray(grads["s"]) @ r.swapaxes(-1, -2) @ r, 1e-6)


def test_statistics_with_axes_of_size_one_are_shared():
    shared = covariance(0)[:, :, :1]
    grads = noise(0, LEAF)
    whole = jnp.broadcast_to(shared, SQUARE)
    outs = [
        run(decorrelate(optax.sgd(1.0)), grads, [(grads, c)]) for c in (shared, whole)
    ]
    assert identical(*outs)


@pytest.mark.parametrize("mode", MODES)
def test_bad_statistics_freeze_only_their_own_matrix(mode):
    """Of six matrices' statistics four are bad; 1e38 is finite, and its trace is not."""
    grads = jnp.zeros(LEAF)
    bad = [(0, 0, 1), (0, 0, 2), (1, 0, 0), (1, 0, 2)]
    good = np.asarray(covariance(0))
    spoilt = good.copy()
    spoilt[0, 0, 1, 2, 3] = np.nan
    spoilt[0, 0, 2, 0, 0] = np.inf
    spoilt[1, 0, 0] = 0.0
    spoilt[1, 0, 2] = 1e38 * np.eye(M)
    tx = decorrelate(optax.sgd(1.0), mode=mode, every=1)
    for before in ([], [(grads, covariance(1))]):
        _, old = run(tx, grads, before)
        _, sound = run(tx, grads, [*before, (grads, good)])
        _, actual = run(tx, grads, [*before, (grads, spoilt)])
        for part in ("count", "covariance", "whitener"):
            expected = np.array(getattr(sound, part))
            for at in bad:
                expected[at] = getattr(old, part)[at]
                assert np.array_equal(getattr(actual, part)[at], expected[at]), (
                    part,
                    at,
                )
            assert_close(getattr(actual, part), expected, FORMULA, part)


def test_whiten_retries_after_bad_first_statistics_and_leaves_other_matrices_alone():
    grads = jnp.zeros((2, N, M))
    flat = jnp.ones((M, M))
    tx = decorrelate(optax.sgd(1.0), mode="whiten", damping=0.0)
    early, late = (covariance(seed, heads=()) for seed in (0, 1))
    first = (grads, jnp.stack([flat, early]))
    _, state = run(tx, grads, [first])
    assert np.array_equal(state.whitener[0], np.eye(M))
    _, state = run(tx, grads, [first, (grads, jnp.stack([late, late]))])
    assert_close(state.whitener[0], whitening(late, 0.0), FORMULA)
    assert_close(state.whitener[1], whitening(early, 0.0), FORMULA)


def updates_to(tx, inputs, goal, tolerance, limit=1500):
    """Updates until the squared error is `tolerance` of what it was."""
    stats = inputs.T @ inputs / len(inputs)

    def body(carry, _):
        s, state = carry
        loss, grads = jax.value_and_grad(
            lambda s: jnp.mean(jnp.square(inputs @ s.T - goal))
        )(s)
        moves, state = tx.update(grads, state, s, stats=stats)
        return (s + moves, state), loss

    s = jnp.zeros((goal.shape[1], inputs.shape[1]))
    _, losses = jax.lax.scan(body, (s, tx.init(s)), None, length=limit)
    reached = losses < tolerance * losses[0]
    return jnp.where(jnp.any(reached), jnp.argmax(reached), limit)


def test_adam_on_an_ill_conditioned_regression_is_five_times_faster_decorrelated():
    """Each at the best of five learning rates."""
    draw = np.random.default_rng(0)
    basis, _ = np.linalg.qr(draw.normal(size=(8, 8)))
    inputs = (draw.normal(size=(256, 8)) * np.geomspace(1.0, 1e-2, 8)) @ basis
    inputs = jnp.asarray(inputs, jnp.float32)
    goal = inputs @ jnp.asarray(draw.normal(size=(8, 3)), jnp.float32)

    def best(wrap):
        count = jax.vmap(
            lambda rate: updates_to(wrap(optax.adam(rate)), inputs, goal, 1e-6)
        )
        return int(jnp.min(jax.jit(count)(jnp.asarray([0.01, 0.03, 0.1, 0.3, 1.0]))))

    plain = best(optax.with_extra_args_support)
    quick = best(decorrelate)
    assert 5 * quick <= plain, (quick, plain)
