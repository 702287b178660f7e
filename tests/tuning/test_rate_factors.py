"""Learning rates of their own for leaves and layers: as runs at those rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import SCANNED, random_state
from upscaled_states import empty_state

from rwkv7_jax.optim.decorrelation import Decorrelator, decorrelate
from rwkv7_jax.optim.optimizer import build_optimizer, scale_by_factors
from rwkv7_jax.tuning.rate_factors import rate_factors, with_rate_factors

STATE = random_state(SCANNED)
LAYERS = SCANNED.num_layers


def moved(tx, state, steps=3, **extra):
    """The state after some updates with gradients of its own."""
    tx = optax.with_extra_args_support(tx)
    opt_state = tx.init(state)
    for step in range(steps):
        rng = np.random.default_rng(step)
        grads = jax.tree.map(
            lambda x, rng=rng: jnp.asarray(rng.normal(size=x.shape), x.dtype), state
        )
        updates, opt_state = tx.update(grads, opt_state, state, **extra)
        state = optax.apply_updates(state, updates)
    return state


def test_each_layer_and_leaf_moves_at_its_own_rate():
    layers = [1.0, 0.3, 0.0][:LAYERS]
    leaves = {"att_shift": 0.7}
    factors = rate_factors(STATE, leaf_rates=leaves, layer_rates=layers)
    rate = 0.1
    found = moved(
        optax.chain(build_optimizer(rate, clip=None), scale_by_factors(factors)), STATE
    )
    for name in ("wkv", "att_shift", "ffn_shift"):
        for layer, factor in enumerate(layers):
            own = rate * factor * leaves.get(name, 1.0)
            alone = moved(build_optimizer(own, clip=None), STATE)
            np.testing.assert_allclose(
                getattr(found, name)[layer],
                getattr(alone, name)[layer],
                rtol=2e-6,
                atol=1e-7,
            )


def test_factors_of_layers_may_be_an_array():
    layers = [0.5] * LAYERS
    wanted = rate_factors(STATE, layer_rates=layers)
    for given in (np.array(layers), jnp.array(layers)):
        found = rate_factors(STATE, layer_rates=given)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_factors_of_one_change_no_bit():
    factors = rate_factors(STATE, layer_rates=[1.0] * LAYERS)
    plain = moved(optax.adam(0.1), STATE)
    found = moved(optax.chain(optax.adam(0.1), scale_by_factors(factors)), STATE)
    jax.tree.map(np.testing.assert_array_equal, plain, found)


def test_a_memory_and_its_writes_share_a_factor_and_features_have_none():
    state = empty_state()
    factors = rate_factors(state, leaf_rates={"memory": 0.5})
    assert np.all(factors.upscaled.memory == 0.5)
    assert np.all(factors.upscaled.write == 0.5)
    assert np.all(factors.wkv == 1)
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(factors.upscaled.features))


def test_a_decorrelated_optimizer_receives_statistics_through_the_factors():
    def wrap(tx):
        return decorrelate(
            tx, mask=STATE.replace(wkv=True, att_shift=False, ffn_shift=False)
        )

    rng = np.random.default_rng(0)
    size = STATE.wkv.shape[-1]
    reads = rng.normal(
        size=(LAYERS, 1, STATE.wkv.shape[2], 4 * size, size)
    ) * np.arange(1, size + 1)
    moments = jnp.asarray(np.einsum("...tm,...tn->...mn", reads, reads), jnp.float32)
    stats = STATE.replace(wkv=moments, att_shift=None, ffn_shift=None)
    plain = Decorrelator(wrap)
    factors = rate_factors(STATE, layer_rates=[0.5] * LAYERS)
    scaled = with_rate_factors(plain, factors)
    assert scaled.statistics is plain.statistics
    before = jax.tree.map(np.array, STATE)
    # Adam would undo factors on its gradients.
    one = moved(plain.wrap(optax.adam(0.1)), STATE, stats=stats)
    half = moved(scaled.wrap(optax.adam(0.1)), STATE, stats=stats)
    np.testing.assert_allclose(
        half.wkv - before.wkv, 0.5 * (one.wkv - before.wkv), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        (
            {"leaf_rates": {"memory": 1.0}},
            ValueError,
            "`leaf_rates` must be of wkv, att_shift",
        ),
        ({"leaf_rates": {"wkv": -1.0}}, ValueError, "`leaf_rates` must be at least 0"),
        (
            {"layer_rates": [1.0]},
            ValueError,
            "`layer_rates` must have a number for each of 3",
        ),
        (
            {"layer_rates": [1.0, float("nan"), 1.0]},
            ValueError,
            "`layer_rates` must be",
        ),
        ({"leaf_rates": {"wkv": "much"}}, TypeError, "`leaf_rates` must be a number"),
        ({"leaf_rates": ["wkv"]}, TypeError, "`leaf_rates` must be a dict of factors"),
        ({"layer_rates": 0.5}, TypeError, "`layer_rates` must be a list of factors"),
        ({"layer_rates": "abc"}, TypeError, "`layer_rates` must be a list of factors"),
    ],
)
def test_bad_factors_are_rejected(unchecked, choices, error, message):
    with pytest.raises(error, match=f"rate_factors: {message}"):
        rate_factors(STATE, **choices)


def test_factors_of_another_tree_are_rejected():
    tx = scale_by_factors({"a": 1.0})
    with pytest.raises(
        ValueError, match="scale_by_factors: `factors` must have the structure"
    ):
        tx.update({"b": jnp.ones(2)}, tx.init({"b": jnp.ones(2)}))


def test_a_factor_that_would_broadcast_its_leaf_is_rejected():
    tx = scale_by_factors({"w": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match=r"broadcast to w of shape \(3,\); got shape"):
        tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}))
