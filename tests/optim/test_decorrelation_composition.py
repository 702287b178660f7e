"""Decorrelated updates inside of other transformations, masks and programs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decorrelation_problems import (
    ADAM,
    GRADS,
    LEAF,
    PARAMS,
    STATS,
    covariance,
    identical,
    noise,
    run,
    skewed,
)
from tolerances import FORMULA, assert_close

from rwkv7_jax.optim.decorrelation import MODES, decorrelate


def test_extra_arguments_reach_the_inner_optimizer():
    def update(updates, state, params=None, *, value, **_):
        return jax.tree.map(lambda g: value * g, updates), state

    doubling = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    grads = noise(0, LEAF)
    tx = decorrelate(doubling)
    moves, _ = tx.update(grads, tx.init(grads), value=2.0, unheard_of=1)
    assert np.array_equal(moves, 2 * grads)
    tx = decorrelate(optax.identity())
    assert np.array_equal(tx.update(grads, tx.init(grads), unheard_of=1)[0], grads)


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
    "mask as a tree": lambda: decorrelate(
        ADAM, mask={"s": True, "w": False, "b": False}
    ),
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
        ADAM, rate=lambda _: jnp.float32(0.2), damping=jnp.float32(1e-4)
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(decorrelate(ADAM), 5),
}


@pytest.mark.parametrize("name", COMPANY)
def test_a_leaf_moves_the_same_alone_and_in_a_tree(name, alone):
    tx = COMPANY[name]()
    stats = STATS
    if (
        name == "partition with masked statistics"
    ):  # they must have the gradients' structure
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
def test_injected_settings_change_without_recompilation(mode):
    tx = optax.inject_hyperparams(decorrelate)(optax.sgd(0.1), mode=mode, every=1)
    step = jax.jit(lambda s, c: tx.update(GRADS["s"], s, PARAMS["s"], stats=c)[1])
    state = step(tx.init(PARAMS["s"]), covariance(0))
    if mode != "whiten":
        moved = step(state, covariance(1))
        assert not np.array_equal(
            moved.inner_state.whitener, state.inner_state.whitener
        )
    state.hyperparams["rate"] = jnp.zeros(())
    state.hyperparams["every"] = jnp.asarray(100)
    after = step(state, covariance(1))
    assert np.array_equal(after.inner_state.whitener, state.inner_state.whitener)
    assert step._cache_size() == 1


def test_microbatches_equal_one_batch_with_the_last_statistics(alone):
    tx = optax.MultiSteps(decorrelate(ADAM), 2)
    pieces = [jax.tree.map(lambda g, a=a: a * g, GRADS) for a in (0.5, 1.5)]
    other = STATS | {"s": covariance(9)}
    params, state = run(tx, PARAMS, [(pieces[0], other), (pieces[1], STATS)] * 3)
    assert_close(params["s"], alone[0], 1e-5)
    assert_close(state.inner_opt_state.whitener["s"], alone[1], FORMULA)


def test_a_non_finite_gradient_moves_nothing_under_apply_if_finite():
    tx = optax.apply_if_finite(decorrelate(ADAM), 5)
    _, before = run(tx, PARAMS, [(GRADS, STATS)])
    bad = GRADS | {"b": GRADS["b"].at[0].set(jnp.nan)}
    params, after = run(tx, PARAMS, [(GRADS, STATS), (bad, STATS)])
    assert identical(after.inner_state, before.inner_state)
    assert np.all(np.isfinite(params["s"]))


@pytest.mark.parametrize("mode", MODES)
def test_the_second_call_does_not_compile_and_states_can_be_donated(mode):
    tx = decorrelate(optax.adam(1e-2), mode=mode)
    step = jax.jit(lambda s: tx.update(GRADS, s, PARAMS, stats=STATS), donate_argnums=0)
    state = tx.init(PARAMS)
    structure = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for _ in range(3):
        _, state = step(state)
    assert step._cache_size() == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == structure


def test_inner_weight_decay_shrinks_the_rotated_parameters():
    """Without a gradient only the decay moves S, and it must not depend on R."""
    decay = optax.chain(optax.add_decayed_weights(0.1), optax.scale(-1.0))
    nothing = jnp.zeros(LEAF)
    moves = {}
    for turned in (True, False):
        tx = decorrelate(decay, turn_params=turned)
        state = tx.init(PARAMS["s"])._replace(whitener=skewed(0))
        moves[turned], _ = tx.update(nothing, state, PARAMS["s"])
    assert_close(moves[True], -0.1 * PARAMS["s"], 1e-5)
    assert float(jnp.max(jnp.abs(moves[False] + 0.1 * PARAMS["s"]))) > 0.01
