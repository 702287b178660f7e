"""Decorrelated updates: what they equal, where R settles, and what they compose with."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerances import FORMULA, assert_close

from rwkv7_jax.optim.decorrelation import MODES, decorrelate, effective_rank, whitening

HEADS, N, M = (2, 1, 3), 4, 6
LEAF, SQUARE = (*HEADS, N, M), (*HEADS, M, M)


def noise(seed, shape, dtype=jnp.float32):
    """Normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def covariance(seed, condition=100.0, heads=HEADS, size=M):
    """Covariances with this condition number, their eigenvectors random and their scales unlike."""
    draw = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(draw.normal(size=(*heads, size, size)))
    values = np.geomspace(1.0, 1.0 / condition, size) * draw.uniform(1, 50, size=(*heads, 1))
    return jnp.asarray(np.einsum("...ij,...j,...kj->...ik", basis, values, basis), jnp.float32)


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
    """The parameters and the optimizer's state behind a list of (gradient, statistics)."""
    step, state = compiled(tx), tx.init(params)
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

    return jax.jit(lambda state: jax.lax.scan(body, state, None, length=count)[0])(state).whitener


def whitened(whitener, target):
    """R C R^T in float64."""
    r = np.asarray(whitener, np.float64)
    return r @ np.asarray(target, np.float64) @ r.swapaxes(-1, -2)


def identical(actual, expected):
    """Whether two trees are equal, bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), actual, expected)
    return all(jax.tree.leaves(same))


ADAMW = optax.with_extra_args_support(optax.adamw(1e-2))


# What an update is.


def test_steps_on_s_are_plain_sgd_steps_on_s_prime(momentum=0.9):
    """In numpy: y = S' R x, squared error, S' = S R^-1 trained by SGD."""
    r, x, goal = skewed(0), noise(1, (*HEADS, M, 20)), noise(2, (*HEADS, N, 20))
    tx = decorrelate(optax.sgd(0.01, momentum))
    start = noise(3, LEAF)

    @jax.jit
    def step(s, state):
        grads = jax.grad(lambda s: 0.5 * jnp.sum(jnp.square(s @ x - goal)))(s)
        moves, state = tx.update(grads, state, s)
        return optax.apply_updates(s, moves), state

    s, state = start, tx.init(start)._replace(whitener=r)
    r, x, goal = (np.asarray(a, np.float64) for a in (r, x, goal))
    prime, trace = np.asarray(start, np.float64) @ np.linalg.inv(r), 0.0
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
    actual, state = run(decorrelate(ADAMW, **settings), params, [(g, stats) for g in grads])
    assert identical(actual, expected)
    assert identical(state.inner, inner_state)


def test_a_new_r_moves_nothing_by_itself():
    params = noise(0, LEAF)
    after, state = run(decorrelate(optax.sgd(1.0)), params, [(0 * params, covariance(0))] * 2)
    assert identical(after, params)
    assert float(jnp.max(jnp.abs(state.whitener - EYE))) > 0.1


def test_the_gradient_is_turned_by_the_r_that_its_own_statistics_moved():
    grads, stats = noise(0, LEAF), covariance(0)
    params, state = run(decorrelate(optax.sgd(1.0)), jnp.zeros(LEAF), [(grads, stats)])
    r = np.asarray(state.whitener, np.float64)
    assert_close(params, -np.asarray(grads) @ r.swapaxes(-1, -2) @ r, 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_updates_keep_the_gradients_dtype_and_r_and_c_are_float32(dtype):
    with jax.enable_x64(True):
        tx = decorrelate(optax.sgd(1.0))
        grads, stats = noise(0, LEAF, dtype), jnp.asarray(covariance(0), dtype)
        moves, state = jax.jit(lambda g, s: tx.update(g, s, stats=stats))(grads, tx.init(grads))
        assert moves.dtype == dtype
        assert (state.covariance.dtype, state.whitener.dtype) == (jnp.float32, jnp.float32)
        r = np.asarray(state.whitener, np.float64)
        exact = -np.asarray(grads, np.float64) @ r.swapaxes(-1, -2) @ r
        assert_close(moves, exact, 1e-2 if dtype == "bfloat16" else 1e-12)


def test_every_product_asks_for_full_precision():
    params = jnp.zeros(LEAF)
    for mode in MODES:
        tx = decorrelate(optax.sgd(1.0), mode=mode)
        update = lambda g, s, c, tx=tx: tx.update(g, s, stats=c)  # noqa: E731
        program = str(jax.make_jaxpr(update)(params, tx.init(params), jnp.zeros(SQUARE)))
        products = program.count("dot_general[")
        assert products >= 5
        assert (
            program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
            + program.count("precision=Precision.HIGHEST")
            == products
        )


# The rules for R.


def published(r, c, rate, kappa, *, columns=False):
    """One step as the paper has it, in float64; `columns` is the slip in the authors' program."""
    z = r @ c @ r.T
    v = np.diag(z) - 1
    off = z - np.diag(np.diag(z))
    return r - rate * ((1 - kappa) * off @ r + kappa * (r * v if columns else np.diag(v) @ r))


@pytest.mark.parametrize("kappa", [0.0, 0.3])
def test_the_online_rule_is_the_published_one(kappa):
    start, c = skewed(0), jnp.asarray(normalised(covariance(1)), jnp.float32)
    plain = {"iterations": 1, "damping": 0, "average": 0, "clip": None, "normalise": False}
    actual = learn(c, count=2, start=start, rate=0.1, balance=kappa, **plain)
    for columns in (False, True):
        expected = np.asarray(start, np.float64)
        for _ in range(2):
            expected = np.stack(
                [
                    published(r, np.asarray(q, np.float64), 0.1, kappa, columns=columns)
                    for r, q in zip(expected.reshape(-1, M, M), c.reshape(-1, M, M), strict=True)
                ]
            ).reshape(SQUARE)
        if not columns:
            assert_close(actual, expected, FORMULA)
        elif kappa > 0:
            assert np.max(np.abs(actual - expected)) > 1e-2


def test_iterations_are_steps_of_the_rule_with_one_covariance():
    c = covariance(0)
    thrice = learn(c, count=3, iterations=1)
    assert_close(learn(c, count=1, iterations=3), thrice, FORMULA)
    assert np.max(np.abs(learn(c, count=1, iterations=1) - thrice)) > 1e-2


def test_one_step_of_the_online_rule_is_no_longer_than_the_clip():
    settings = {"iterations": 1, "normalise": False, "damping": 0.0}
    move = EYE - learn(100 * covariance(0), clip=0.5, **settings)
    assert_close(np.linalg.norm(move, axis=(-2, -1)), np.full(HEADS, 0.5), 1e-5)
    short, free = (learn(1e-3 * covariance(0), clip=clip, **settings) for clip in (0.5, None))
    assert_close(short, free, FORMULA)


def test_the_online_rule_settles_where_outputs_are_decorrelated():
    c = covariance(0)
    target = normalised(c) + 3e-4 * np.eye(M)
    assert np.max(np.abs(whitened(learn(c, count=100), target) - np.eye(M))) < 0.01
    assert np.max(np.abs(whitened(learn(c, count=1), target) - np.eye(M))) > 0.3


@pytest.mark.parametrize("mode", ["exact", "whiten"])
def test_the_closed_forms_are_there_at_once_and_ignore_the_scale(mode):
    c = covariance(0)
    scale = jnp.asarray([1e-12, 1e-6, 1.0, 10.0, 1e6, 1e12]).reshape(*HEADS, 1, 1)
    error = whitened(learn(scale * c, mode=mode), normalised(c) + 3e-4 * np.eye(M)) - np.eye(M)
    assert np.max(np.abs(error)) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_an_isotropic_covariance_leaves_r_at_the_identity(mode):
    c = 7.0 * EYE
    r = learn(c, count=5, mode=mode, damping=0.0)
    assert_close(r, EYE, FORMULA)


def test_directions_without_inputs_stay_bounded_by_the_damping_and_grow_without_it():
    x = noise(0, (2, M, 2))
    c = jnp.einsum("hmi,hki->hmk", x, x)
    damped = np.linalg.norm(learn(c, count=2000, damping=1e-3), 2, axis=(-2, -1))
    assert np.all(damped <= 1.01 * 1e-3**-0.5), damped
    assert np.all(damped > 0.9 * 1e-3**-0.5), damped
    free = np.linalg.norm(learn(c, count=100, damping=0.0), 2, axis=(-2, -1))
    assert np.all(free > 1e4), free


def test_exact_r_is_renewed_at_every_so_many_statistics_and_whiten_once():
    first, second = covariance(0), covariance(1)
    grads = jnp.zeros(LEAF)
    updates = [(grads, first), (grads, None), (grads, second), (grads, second)]
    exact = decorrelate(optax.sgd(1.0), mode="exact", damping=1e-3, every=3, average=0.0)
    before, after = (run(exact, grads, updates + more)[1] for more in ([], [(grads, second)]))
    assert_close(before.whitener, whitening(first), FORMULA)
    assert_close(after.whitener, whitening(second), FORMULA)
    assert np.array_equal(after.count, np.full(HEADS, 4))
    once = decorrelate(optax.sgd(1.0), mode="whiten", damping=1e-3, average=0.0)
    assert_close(run(once, grads, updates * 3)[1].whitener, whitening(first), FORMULA)


def test_the_average_starts_with_the_first_statistics():
    seen, grads = [covariance(i) for i in range(3)], jnp.zeros(LEAF)
    _, state = run(decorrelate(optax.sgd(1.0), average=0.8), grads, [(grads, c) for c in seen])
    a, b, c = (np.asarray(x, np.float64) for x in seen)
    assert_close(state.covariance, 0.8 * (0.8 * a + 0.2 * b) + 0.2 * c, FORMULA)


# Closed forms.


@pytest.mark.parametrize(("size", "condition", "bar"), [(6, 1e3, 1e-4), (256, 1e5, 1e-2)])
def test_whitening_is_the_inverse_square_root_of_eigh_in_float64(size, condition, bar):
    c = covariance(0, condition, heads=(), size=size)
    r = np.asarray(jax.jit(lambda c: whitening(c, 0.0))(c), np.float64)
    values, basis = np.linalg.eigh(normalised(c))
    assert_close(r, (basis * values**-0.5) @ basis.T, bar)
    assert np.linalg.norm(whitened(r, normalised(c)) - np.eye(size), 2) < bar
    assert np.array_equal(r, r.T)


def test_whitening_damps_in_units_of_the_mean_eigenvalue_or_in_the_inputs_own():
    c = np.asarray(covariance(0), np.float64)
    for normalise, base in ((True, normalised(c)), (False, c)):
        r = whitening(np.float32(c), 0.5, normalise=normalise)
        assert np.max(np.abs(whitened(r, base + 0.5 * np.eye(M)) - np.eye(M))) < 1e-4


def test_whitening_of_nothing_is_the_identity_and_of_a_bad_matrix_nan_and_neither_spreads():
    good = covariance(0, heads=())
    c = jnp.stack([good, 0 * good, -good, good.at[1, 2].set(jnp.nan)])
    r = whitening(c)
    assert_close(r[0], whitening(good), FORMULA)
    assert np.array_equal(r[1], np.eye(M))
    assert np.all(np.isnan(r[2:]))


def test_the_effective_rank_counts_directions():
    c = np.zeros((4, M, M), np.float32)
    c[0], c[1, :2, :2], c[2] = 3 * np.eye(M), np.eye(2), np.ones((M, M))
    assert_close(effective_rank(c), [M, 2, 1, 0], FORMULA)
    assert_close(effective_rank(1e-25 * c[:1]), [M], FORMULA)


# Statistics: missing, shared, bad.


def test_without_statistics_r_stays_and_goes_on_being_used():
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
    shared, grads = covariance(0)[:, :, :1], noise(0, LEAF)
    whole = jnp.broadcast_to(shared, SQUARE)
    outs = [run(decorrelate(optax.sgd(1.0)), grads, [(grads, c)]) for c in (shared, whole)]
    assert identical(*outs)


@pytest.mark.parametrize("mode", MODES)
def test_bad_statistics_leave_their_matrix_alone_and_no_other(mode):
    """Of six matrices' statistics four are bad; 1e38 is finite, and its trace is not."""
    grads, bad = jnp.zeros(LEAF), [(0, 0, 1), (0, 0, 2), (1, 0, 0), (1, 0, 2)]
    good = np.asarray(covariance(0))
    spoilt = good.copy()
    spoilt[0, 0, 1, 2, 3], spoilt[0, 0, 2, 0, 0] = np.nan, np.inf
    spoilt[1, 0, 0], spoilt[1, 0, 2] = 0.0, 1e38 * np.eye(M)
    tx = decorrelate(optax.sgd(1.0), mode=mode, every=1)
    for before in ([], [(grads, covariance(1))]):
        _, old = run(tx, grads, before)
        _, sound = run(tx, grads, [*before, (grads, good)])
        _, actual = run(tx, grads, [*before, (grads, spoilt)])
        for part in ("count", "covariance", "whitener"):
            expected = np.array(getattr(sound, part))
            for at in bad:
                expected[at] = getattr(old, part)[at]
                assert np.array_equal(getattr(actual, part)[at], expected[at]), (part, at)
            assert_close(getattr(actual, part), expected, FORMULA, part)


def test_whiten_tries_again_where_the_first_statistics_could_not_be_whitened():
    grads, flat = jnp.zeros((N, M)), jnp.ones((M, M))
    tx = decorrelate(optax.sgd(1.0), mode="whiten", damping=0.0)
    good = covariance(0, heads=())
    _, state = run(tx, grads, [(grads, flat)])
    assert np.array_equal(state.whitener, np.eye(M))
    _, state = run(tx, grads, [(grads, flat), (grads, good)])
    assert_close(state.whitener, whitening(good, 0.0), FORMULA)


# Company.


def test_extra_arguments_go_to_the_inner_optimizer_and_unknown_ones_do_no_harm():
    def update(updates, state, params=None, *, value, **_):
        return jax.tree.map(lambda g: value * g, updates), state

    doubling = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    grads = noise(0, LEAF)
    tx = decorrelate(doubling)
    moves, _ = tx.update(grads, tx.init(grads), value=2.0, unheard_of=1)
    assert np.array_equal(moves, 2 * grads)
    tx = decorrelate(optax.identity())
    assert np.array_equal(tx.update(grads, tx.init(grads), unheard_of=1)[0], grads)


PARAMS = {"s": noise(0, LEAF), "w": noise(1, (3, 5)), "b": noise(2, (5,))}
GRADS = jax.tree.map(jnp.sin, PARAMS)
STATS = {"s": covariance(0), "w": None, "b": None}
ADAM = optax.scale_by_adam()


@pytest.fixture(scope="module")
def alone():
    """The leaf "s" by itself, after three decorrelated Adam updates."""
    params, state = run(decorrelate(ADAM), PARAMS["s"], [(GRADS["s"], STATS["s"])] * 3)
    return params, state.whitener


def only_s(params):
    """A mask for trees that optax may have masked before."""
    return {name: name == "s" for name in params}


COMPANY = {
    "mask as a function": lambda: decorrelate(ADAM, mask=only_s),
    "mask as a tree": lambda: decorrelate(ADAM, mask={"s": True, "w": False, "b": False}),
    "chain": lambda: optax.chain(optax.identity(), decorrelate(ADAM), optax.scale(1.0)),
    "masked": lambda: optax.masked(decorrelate(ADAM), only_s),
    "partition": lambda: optax.partition(
        {"dbp": decorrelate(ADAM), "plain": optax.sgd(0.1)},
        {"s": "dbp", "w": "plain", "b": "plain"},
    ),
    "partition with masked statistics": lambda: optax.partition(
        {"dbp": decorrelate(ADAM), "plain": optax.sgd(0.1)},
        {"s": "dbp", "w": "plain", "b": "plain"},
        mask_compatible_extra_args=True,
    ),
    "injected": lambda: optax.inject_hyperparams(decorrelate)(
        ADAM, rate=lambda _: jnp.float32(0.2), damping=jnp.float32(3e-4)
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(decorrelate(ADAM), 5),
}


@pytest.mark.parametrize("name", COMPANY)
def test_in_company_a_leaf_moves_as_it_does_alone(name, alone):
    tx = COMPANY[name]()
    stats = STATS
    if name == "partition with masked statistics":  # they must have the gradients' structure
        stats = {"s": STATS["s"], "w": jnp.zeros((5, 5)), "b": jnp.zeros(())}
    params, state = run(tx, PARAMS, [(GRADS, stats)] * 3)
    assert_close(params["s"], alone[0], FORMULA)
    (tree,) = (found for _, found in optax.tree.get_all_with_path(state, "whitener"))
    assert_close(tree["s"], alone[1], FORMULA)
    if "mask" in name or "partition" in name:
        assert jax.tree.leaves(tree["w"]) == []
    assert jax.tree.leaves(tree["b"]) == []
    assert identical(optax.tree.map_params(tx, lambda x: x, state), state)


@pytest.mark.parametrize("mode", MODES)
def test_injected_settings_may_change_between_updates_without_compiling_anew(mode):
    tx = optax.inject_hyperparams(decorrelate)(optax.sgd(0.1), mode=mode, every=1)
    step = jax.jit(lambda s, c: tx.update(GRADS["s"], s, PARAMS["s"], stats=c)[1])
    state = step(tx.init(PARAMS["s"]), covariance(0))
    if mode != "whiten":
        moved = step(state, covariance(1))
        assert not np.array_equal(moved.inner_state.whitener, state.inner_state.whitener)
    state.hyperparams["rate"] = jnp.zeros(())
    state.hyperparams["every"] = jnp.asarray(100)
    after = step(state, covariance(1))
    assert np.array_equal(after.inner_state.whitener, state.inner_state.whitener)
    assert step._cache_size() == 1


def test_micro_batches_move_as_one_batch_does_and_the_last_ones_statistics_count(alone):
    tx = optax.MultiSteps(decorrelate(ADAM), 2)
    pieces = [jax.tree.map(lambda g, a=a: a * g, GRADS) for a in (0.5, 1.5)]
    other = STATS | {"s": covariance(9)}
    params, state = run(tx, PARAMS, [(pieces[0], other), (pieces[1], STATS)] * 3)
    assert_close(params["s"], alone[0], 1e-5)
    assert_close(state.inner_opt_state.whitener["s"], alone[1], FORMULA)


def test_a_gradient_that_is_not_finite_moves_nothing_under_apply_if_finite():
    tx = optax.apply_if_finite(decorrelate(ADAM), 5)
    _, before = run(tx, PARAMS, [(GRADS, STATS)])
    bad = GRADS | {"b": GRADS["b"].at[0].set(jnp.nan)}
    params, after = run(tx, PARAMS, [(GRADS, STATS), (bad, STATS)])
    assert identical(after.inner_state, before.inner_state)
    assert np.all(np.isfinite(params["s"]))


@pytest.mark.parametrize("mode", MODES)
def test_the_second_call_does_not_compile_and_donated_states_are_whole(mode):
    tx = decorrelate(optax.adam(1e-2), mode=mode)
    step = jax.jit(lambda s: tx.update(GRADS, s, PARAMS, stats=STATS), donate_argnums=0)
    state = tx.init(PARAMS)
    structure = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for _ in range(3):
        _, state = step(state)
    assert step._cache_size() == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == structure


def updates_to(tx, inputs, goal, tolerance, limit=1500):
    """Updates until the squared error is `tolerance` of what it was."""
    stats = inputs.T @ inputs / len(inputs)

    def body(carry, _):
        s, state = carry
        loss, grads = jax.value_and_grad(lambda s: jnp.mean(jnp.square(inputs @ s.T - goal)))(s)
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
        count = jax.vmap(lambda rate: updates_to(wrap(optax.adam(rate)), inputs, goal, 1e-6))
        return int(jnp.min(jax.jit(count)(jnp.asarray([0.01, 0.03, 0.1, 0.3, 1.0]))))

    plain, quick = best(optax.with_extra_args_support), best(decorrelate)
    assert 5 * quick <= plain, (quick, plain)


# What is refused.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "x"}, "`mode` must be one of online, exact, whiten; got 'x'."),
        ({"balance": 1.5}, "`balance` must be between 0 and 1; got 1.5."),
        ({"balance": -0.1}, "`balance` must be between 0 and 1; got -0.1."),
        ({"damping": -1e-3}, "`damping` must be at least 0; got -0.001."),
        ({"damping": float("nan")}, "`damping` must be at least 0; got nan."),
        ({"rate": -1}, "`rate` must be at least 0; got -1."),
        ({"average": 2}, "`average` must be between 0 and 1; got 2."),
        ({"every": 0}, "`every` must be at least 1; got 0."),
        ({"iterations": -1}, "`iterations` must be at least 0; got -1."),
        ({"clip": 0}, "`clip` must be above 0, or None; got 0."),
    ],
)
def test_settings_out_of_range_are_refused_in_one_sentence(settings, words):
    with pytest.raises(ValueError, match=f"^decorrelate: {re.escape(words)}$"):
        decorrelate(optax.sgd(1.0), **settings)


def test_masks_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match=r"`mask` must select .*; got \['b'\] of shape \(5,\)"):
        decorrelate(ADAM, mask=True).init(PARAMS)
    with pytest.raises(ValueError, match="`mask` must have the parameters' structure"):
        decorrelate(ADAM, mask={"s": True}).init(PARAMS)


@pytest.mark.parametrize(
    ("stats", "error", "words"),
    [
        ({"s": STATS["s"]}, ValueError, "`stats` must have the gradients' structure"),
        (STATS["s"], ValueError, "`stats` must have the gradients' structure"),
        (STATS | {"s": jnp.zeros((M, M))}, ValueError, "`stats`['s'] must have shape (2, 1, 3, 6"),
        (STATS | {"s": jnp.zeros((*HEADS, N, N))}, ValueError, "got (2, 1, 3, 4, 4)."),
        (STATS | {"s": jnp.zeros((3, 1, 3, M, M))}, ValueError, "got (3, 1, 3, 6, 6)."),
        (STATS | {"b": jnp.zeros((5, 5))}, ValueError, "`stats`['b'] must be None"),
        (STATS | {"s": jnp.zeros(SQUARE, int)}, TypeError, "`stats`['s'] must be a floating array"),
        (
            STATS | {"s": [1.0]},
            TypeError,
            "`stats`['s'] must be a floating array; got <class 'list'>.",
        ),
    ],
)
def test_statistics_that_do_not_fit_are_refused_by_name(stats, error, words):
    tx = decorrelate(ADAM)
    state = tx.init(PARAMS)
    with pytest.raises(error, match=re.escape(words)):
        tx.update(GRADS, state, PARAMS, stats=stats)
