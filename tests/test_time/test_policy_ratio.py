"""The probability ratio of the policy loss, restated in NumPy: clipping, weights, updates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reward_tasks import prompts_at, sevens
from scipy.special import log_softmax
from tiny_models import SMALLEST, lively, random_state, restated
from tolerances import SAME, assert_close

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.test_time.grpo import PolicyBatches, grpo
from rwkv7_jax.test_time.losses import (
    _clipped_ratio,
    _log_bounds,
    drawn_logps,
    policy_loss,
)
from rwkv7_jax.test_time.rollouts import RolloutSampler

CONFIG = SMALLEST
MODEL = RWKV7(CONFIG)
LOW, HIGH = 0.1, 0.3
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def params():
    return lively(CONFIG)


@pytest.fixture(scope="module")
def batch(params):
    """Rows with old log-probabilities from another state, so that ratios differ from 1."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (4, 9)).astype(np.int32)
    mask = (rng.random((4, 8)) < 0.8).astype(np.float32)
    old = drawn_logps(MODEL, params, random_state(CONFIG, seed=3), tokens, TEMPERATURE)
    return Batch(
        tokens=tokens,
        mask=mask,
        advantages=np.array([1.5, -0.5, 0.25, -2.0], np.float32),
        old_logp=np.asarray(old),
        importance=rng.uniform(0.2, 2.0, (4, 8)).astype(np.float32),
    )


def logps(params, state, tokens):
    rows = [restated(params, ids[:-1], state, CONFIG)[0] for ids in tokens]
    logp = log_softmax(np.stack(rows) / TEMPERATURE, axis=-1)
    return np.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]


def published(params, state, batch):
    """Return the published loss (the minimum of ratio and clipped ratio) and the clip fraction."""
    ratio = np.exp(logps(params, state, batch.tokens) - batch.old_logp)
    advantages = batch.advantages[:, None]
    free = ratio * advantages
    clipped = np.clip(ratio, 1 - LOW, 1 + HIGH) * advantages
    weights = batch.mask / batch.mask.sum()
    objective = np.minimum(free, clipped) * batch.importance
    return -np.sum(weights * objective), np.sum(weights * (clipped < free))


@pytest.fixture(scope="module")
def gradient(params):
    loss = policy_loss(
        MODEL, params, temperature=TEMPERATURE, epsilon_low=LOW, epsilon_high=HIGH
    )
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_loss_gradient_and_clip_fraction_match_the_publication(params, gradient, batch):
    state = random_state(CONFIG, seed=5)
    (value, metrics), grads = gradient(state, batch)
    expected, clipped = published(params, state, batch)
    assert_close(value, expected, SAME["model"], "value")
    assert float(metrics["clipped"]) == pytest.approx(clipped, abs=1e-6)
    assert 0.2 < clipped < 0.9
    direction = np.random.default_rng(5).normal(size=state.wkv.shape)
    wkv = np.asarray(state.wkv, np.float64)
    step = 1e-5
    ends = []
    for sign in (1, -1):
        moved = state.replace(wkv=wkv + sign * step * direction)
        ends.append(published(params, moved, batch)[0])
    product = np.vdot(np.asarray(grads.wkv, np.float64), direction)
    np.testing.assert_allclose(product, (ends[0] - ends[1]) / (2 * step), rtol=1e-3)


def test_clipping_only_stops_updates_that_raise_the_objective(params, gradient, batch):
    """A ratio above the upper bound is not clipped if the advantage is negative, and vice versa."""
    state = random_state(CONFIG, seed=5)
    now = np.asarray(drawn_logps(MODEL, params, state, batch.tokens, TEMPERATURE))
    for shift, stopped in ((1.0, [0, 2]), (-1.0, [1, 3])):
        moved = batch.replace(old_logp=now - shift, importance=None)
        _, metrics = gradient(state, moved)[0]
        share = batch.mask[stopped].sum() / batch.mask.sum()
        assert float(metrics["clipped"]) == pytest.approx(share, abs=1e-6)
        one = moved.replace(mask=batch.mask * np.isin(np.arange(4), stopped)[:, None])
        assert not np.any(gradient(state, one)[1].wkv)


def test_a_ratio_of_one_gives_the_log_p_gradient_bit_exactly():
    rng = np.random.default_rng(1)
    nats = jnp.asarray(rng.uniform(0.1, 9.0, (4, 8)), jnp.float32)
    policy = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    bounds = _log_bounds(LOW, HIGH)

    def term(nats):
        ratio, clipped = _clipped_ratio(-nats - (-first), policy[:, :1], bounds)
        return -jnp.sum(policy * ratio), clipped

    first = nats
    found, clipped = jax.grad(term, has_aux=True)(nats)
    # Of the sum of policy x nats.
    np.testing.assert_array_equal(found, policy)
    assert not np.any(clipped)


def test_a_row_without_an_advantage_is_never_clipped():
    log_ratio = jnp.array([[-9.0, 9.0]])
    _, clipped = _clipped_ratio(log_ratio, jnp.zeros((1, 1)), _log_bounds(LOW, HIGH))
    assert not np.any(clipped)


def test_unit_importance_weights_change_nothing_bit_exactly(params, batch):
    state = random_state(CONFIG, seed=5)
    loss = policy_loss(MODEL, params, temperature=TEMPERATURE)
    step = jax.jit(jax.grad(loss, has_aux=True))
    plain = batch.replace(old_logp=None, importance=None)
    ones = plain.replace(importance=np.ones((4, 8), np.float32))
    expected, _ = step(state, plain)
    found, _ = step(state, ones)
    np.testing.assert_array_equal(found.wkv, expected.wkv)


def test_the_first_of_several_updates_equals_a_single_update(params, batch):
    state = random_state(CONFIG, seed=5)
    loss = policy_loss(MODEL, params, temperature=TEMPERATURE)
    plain = batch.replace(old_logp=None, importance=None)
    old = drawn_logps(MODEL, params, state, batch.tokens, TEMPERATURE)
    expected = jax.jit(jax.grad(loss, has_aux=True))(state, plain)[0]
    rows = plain.replace(old_logp=np.asarray(old))
    found, metrics = jax.jit(jax.grad(loss, has_aux=True))(state, rows)
    # Another program measures the old ones, so ratios are 1 up to rounding.
    assert_close(found.wkv, expected.wkv, SAME["gradient"], "gradient")
    assert float(metrics["clipped"]) == 0


def test_an_overflowing_ratio_is_clipped_at_the_bound(params, gradient, batch):
    state = random_state(CONFIG, seed=5)
    rows = batch.replace(
        old_logp=np.full((4, 8), -300.0, np.float32),
        advantages=np.ones(4, np.float32),
        importance=None,
    )
    (value, metrics), grads = gradient(state, rows)
    assert float(value) == pytest.approx(-(1 + HIGH), rel=1e-6)
    assert float(metrics["clipped"]) == pytest.approx(1.0)
    assert not np.any(grads.wkv)


PROMPTS = [[1, 2], [3, 4, 5]]


def source_of(params, model=MODEL, *, reward=sevens, **choices):
    sampler = RolloutSampler(
        model, params, group=4, tokens=6, temperature=TEMPERATURE, stop_ids=(4,)
    )
    return PolicyBatches(
        sampler, lambda step: PROMPTS, reward, key=jax.random.key(4), **choices
    )


def test_a_batch_for_several_updates_has_the_sampling_log_probabilities(params):
    state = random_state(CONFIG, seed=2)
    source = source_of(params, several_updates=True)
    made = source.batch(state, 3)
    wanted = logps(params, state, made.tokens) * made.mask
    np.testing.assert_allclose(made.old_logp, wanted, atol=2e-5)
    plain = source_of(params).batch(state, 3)
    assert plain.old_logp is None and plain.importance is None
    np.testing.assert_array_equal(plain.tokens, made.tokens)


def test_uniform_groups_are_sampled_again_with_other_keys(params, monkeypatch):
    keys = []
    draw = RolloutSampler.draw

    def noting_the_key(sampler, state, prompts, key):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return draw(sampler, state, prompts, key)

    monkeypatch.setattr(RolloutSampler, "draw", noting_the_key)
    source = source_of(params, reward=lambda prompt, completion: 1.0, redraws=2)
    assert source.batch(random_state(CONFIG, seed=2), 3) is None
    assert len(keys) == len(set(keys)) == 3


def test_importance_weights_are_capped_ratios_of_training_to_sampling(params):
    state = random_state(CONFIG, seed=2)
    rough = RWKV7(dataclasses.replace(CONFIG, dtype="bfloat16"))
    cap = 1.002
    source = source_of(params, rough, importance_cap=cap, trainer=MODEL)
    made = source.batch(state, 0)
    drawn = source._sampler.draw(
        state, PROMPTS, jax.random.fold_in(jax.random.key(4), 0)
    )
    counted = made.mask > 0
    ratios = np.exp(logps(params, state, made.tokens) - drawn.logps)[counted]
    found = made.importance[counted]
    np.testing.assert_allclose(found, np.minimum(ratios, cap), atol=1e-4)
    assert found.max() <= np.float32(cap) < ratios.max()
    metrics = source.metrics
    assert metrics["importance_mean"] == pytest.approx(ratios.mean(), abs=1e-4)
    assert metrics["importance_max"] == pytest.approx(ratios.max(), abs=1e-3)
    assert 0 < metrics["importance_capped"] < 1
    assert made.old_logp is None


def test_equal_sampler_and_trainer_give_unit_importance_weights(params):
    source = source_of(params, importance_cap=2.0)
    made = source.batch(random_state(CONFIG, seed=2), 0)
    np.testing.assert_allclose(made.importance[made.mask > 0], 1, atol=1e-4)
    assert source.metrics["importance_capped"] == 0


KEY = jax.random.key(4)


def sampler_of(params, model=MODEL):
    return RolloutSampler(model, params, group=4, tokens=4, stop_ids=())


def test_several_updates_reuse_the_same_completions(params):
    runs = {}
    for updates in (1, 3):
        runs[updates] = grpo(
            sampler_of(params),
            lambda step: PROMPTS,
            sevens,
            key=KEY,
            steps=1,
            updates=updates,
            loss=policy_loss(MODEL, params, epsilon_high=0.28),
            learning_rate=0.5,
        )
    one = runs[1]
    three = runs[3]
    assert one.history[0]["reward"] == three.history[0]["reward"]
    assert "clipped" not in one.history[0]
    assert 0 < three.history[0]["clipped"] < 1
    assert three.budget.gradient_tokens == 3 * one.budget.gradient_tokens
    # The trainer reads the rows once more, for the log-probabilities.
    extra = three.budget.rollout_tokens - one.budget.rollout_tokens
    assert extra == one.budget.gradient_tokens
    assert np.abs(three.state.wkv).max() > np.abs(one.state.wkv).max()


@pytest.mark.slow
def test_sampling_in_bfloat16_raises_the_reward_of_the_float32_model(params):
    out = grpo(
        sampler_of(params, RWKV7(dataclasses.replace(CONFIG, dtype="bfloat16"))),
        prompts_at,
        sevens,
        key=KEY,
        steps=30,
        updates=2,
        loss=policy_loss(MODEL, params),
        importance_cap=2.0,
        learning_rate=0.5,
        held_out=[[1 + n, 2] for n in range(8)],
        stop_reward=2.0,
    )
    seen = [entry["held_out"] for entry in out.history if "held_out" in entry]
    assert seen[-1] > seen[0] + 0.2
    assert all(
        entry["importance_max"] > 0 for entry in out.history if "reward" in entry
    )


def test_invalid_bounds_and_caps_are_rejected(params, unchecked):
    for change, message in [
        ({"epsilon_low": -0.1}, "`epsilon_low` must be"),
        ({"epsilon_low": 1.5}, "`epsilon_low` must be"),
        ({"epsilon_high": float("nan")}, "`epsilon_high` must be"),
    ]:
        with pytest.raises(ValueError, match=f"policy_loss: {message}"):
            policy_loss(MODEL, params, **change)
    for change, message in [
        ({"importance_cap": 0.0}, "`importance_cap` must be above 0"),
        ({"updates": 0}, "`updates` must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=f"grpo: {message}"):
            grpo(sampler_of(params), lambda step: PROMPTS, sevens, key=KEY, **change)


def test_old_log_probabilities_of_another_shape_are_rejected(params, gradient, batch):
    with pytest.raises(ValueError, match=r"`batch.old_logp` must have shape \(4, 8\)"):
        gradient(random_state(CONFIG), batch.replace(old_logp=np.zeros((4, 1))))
