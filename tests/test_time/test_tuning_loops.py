"""Test-time tuning: rollouts in groups, and rewards that rise."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from reward_tasks import prompts_at, sevens
from tiny_models import SMALLEST, lively, random_state

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.generation import decode_loop as decoding
from rwkv7_jax.generation import prefill
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.optim.decorrelation import decorrelate
from rwkv7_jax.test_time.distillation import distill
from rwkv7_jax.test_time.expert_iteration import expert_iteration
from rwkv7_jax.test_time.grpo import grpo
from rwkv7_jax.test_time.losses import distillation_loss, policy_loss
from rwkv7_jax.test_time.rewarded_rollouts import make_policy_batch
from rwkv7_jax.test_time.rewards import advantages
from rwkv7_jax.test_time.rollouts import RolloutSampler
from rwkv7_jax.test_time.traces import TokenBudget, Trace
from rwkv7_jax.test_time.tuning_loop import (
    RewardTarget,
    StateBatchSource,
    TuningLoop,
    start_tuning,
)
from rwkv7_jax.training.train_step import TrainState
from rwkv7_jax.tuning.read_statistics import state_statistics
from rwkv7_jax.tuning.state_tuning import trainable_mask
from rwkv7_jax.tuning.upscaling import upscale

CONFIG = SMALLEST
MODEL = RWKV7(CONFIG)
KEY = jax.random.key(4)
# Two prompts, four completions each; held-out prompts as many as these rows, so that they share
# programs.
PROMPTS = [[1, 2], [3, 4, 5]]
GROUP = 4
TOKENS = 6
HELD_OUT = [[1 + n, 2, 1 + n] for n in range(8)]


@pytest.fixture(scope="module")
def params():
    """Weights with a strong time mix, so that the state has a large effect."""

    def louder(path, leaf):
        return leaf * 8 if "['att']['output']" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(louder, lively(CONFIG))


def draw(params, state=None, prompts=PROMPTS, key=KEY, **choices):
    choices = {"group": GROUP, "tokens": TOKENS} | choices
    return RolloutSampler(MODEL, params, **choices).draw(state, prompts, key)


@pytest.fixture(scope="module")
def endless(params):
    return draw(params, stop_ids=())


def test_shared_prefill_gives_the_same_rollouts(params, endless):
    repeated = [prompt for prompt in PROMPTS for _ in range(GROUP)]
    out = generate(MODEL, params, repeated, tokens=TOKENS, key=KEY, stop_ids=())
    assert [list(c) for c in endless.completions] == out.tokens
    assert len(set(map(tuple, out.tokens))) > GROUP
    assert endless.prompts == [tuple(p) for p in repeated]


def test_a_completion_ends_with_the_sampled_stop_id(params, endless):
    stops = (4, 8, 1)
    stopped = draw(params, stop_ids=stops).completions
    cut = [
        next((n for n, i in enumerate(c) if i in stops), 5) + 1
        for c in endless.completions
    ]
    assert stopped == [c[:end] for c, end in zip(endless.completions, cut, strict=True)]
    assert len({c[-1] for c in stopped} & set(stops)) > 1


def test_a_completion_is_cut_at_the_token_limit_unless_a_stop_id_is_there(params):
    sampler = RolloutSampler(MODEL, params, group=GROUP, tokens=3, stop_ids=(4,))
    assert sampler.is_cut((1, 2, 3))
    assert not sampler.is_cut((1, 2, 4)) and not sampler.is_cut((1, 4))


def test_rows_match_the_rollouts_and_each_prompt_counts_once(params):
    out = draw(params, stop_ids=(4, 8))
    assert out.tokens.shape == (8, 17) and out.mask.shape == (8, 16)
    for row, (prompt, completion) in enumerate(
        zip(out.prompts, out.completions, strict=True)
    ):
        ids = [*prompt, *completion]
        assert out.tokens[row].tolist() == ids + [0] * (17 - len(ids))
        counted = [0] * (len(prompt) - 1) + [1] * len(completion)
        assert out.mask[row].tolist() == counted + [0] * (16 - len(counted))
    drawn = sum(map(len, out.completions))
    assert out.budget == TokenBudget(rollout_tokens=2 + 3 + drawn)


def test_rollouts_depend_on_the_key_without_recompiling(params, endless):
    programs = decoding.decode, prefill.prefill
    before = [program._cache_size() for program in programs]
    again, other = (draw(params, stop_ids=(), key=jax.random.key(k)) for k in (4, 5))
    assert again.completions == endless.completions != other.completions
    draw(params, random_state(CONFIG), [[5, 6, 7, 8], [9]], tokens=3, temperature=0.5)
    assert [program._cache_size() for program in programs] == before


def test_the_held_out_reward_uses_greedy_completions(params):
    reward = lambda prompt, completion: completion[0]  # noqa: E731
    choices = {"tokens": TOKENS, "stop_ids": ()}
    sampler = RolloutSampler(MODEL, params, group=GROUP, **choices)
    value, budget = sampler.mean_reward(None, HELD_OUT, reward)
    out = generate(MODEL, params, HELD_OUT, temperature=0, **choices)
    assert value == np.mean([row[0] for row in out.tokens])
    assert budget == TokenBudget(rollout_tokens=8 * (3 + TOKENS))


def test_a_policy_batch_has_the_advantages_of_its_rewards(endless):
    reward = lambda prompt, completion: completion.count(8)  # noqa: E731
    made = make_policy_batch(endless, reward, group=GROUP)
    expected = np.array([c.count(8) for c in endless.completions], float).reshape(
        2, GROUP
    )
    np.testing.assert_array_equal(made.rewards, expected)
    np.testing.assert_allclose(
        made.batch["advantages"], advantages(expected).ravel(), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_array_equal(made.batch["tokens"], endless.tokens)
    assert made.budget == endless.budget and not made.uniform
    # Also of the rows that one of several processes has.
    own = make_policy_batch(dataclasses.replace(endless, first=1), reward, group=GROUP)
    jax.tree.map(np.testing.assert_array_equal, own.batch, made.batch)


DRAWS = {"tokens": 4, "group": GROUP, "stop_ids": ()}
STEP_TOKENS = 2 + 3 + 8 * 4
LOOK_TOKENS = 8 * (3 + 4)


def loop_arguments(params, reward=sevens):
    """Return the arguments that GRPO and expert iteration share."""
    sampler = RolloutSampler(MODEL, params, **DRAWS)
    return {
        "sampler": sampler,
        "prompts_at": prompts_at,
        "reward": reward,
        "key": KEY,
    }


@pytest.fixture(scope="module")
def improved(params):
    """Return the result of fifteen GRPO steps and the state after each step."""
    states = []
    keep = lambda entry, state: states.append(jax.tree.map(np.array, state))  # noqa: E731
    choices = {
        "held_out": HELD_OUT,
        "evaluate_every": 5,
        "learning_rate": 0.5,
        "on_step": keep,
    }
    before = jax.tree.map(np.array, params)
    out = grpo(**loop_arguments(params), steps=15, stop_reward=2.0, **choices)
    jax.tree.map(np.testing.assert_array_equal, before, params)
    return out, states


def test_grpo_raises_a_verifiable_reward(improved):
    history = improved[0].history
    seen = [entry["held_out"] for entry in history if "held_out" in entry]
    print(f"held-out reward {seen}; {improved[0].budget}")
    assert [entry["step"] for entry in history if "held_out" in entry] == [0, 5, 10, 15]
    assert seen[-1] > seen[0] + 0.4


def test_only_the_wkv_state_is_tuned(improved):
    state = improved[0].state
    assert np.abs(state.wkv).max() > 0.5
    assert not np.any(state.att_shift) and not np.any(state.ffn_shift)


def test_the_grpo_budget_counts_rollout_and_gradient_tokens(improved):
    updates = int(sum(entry.get("updated", 0) for entry in improved[0].history))
    assert updates > 10
    expected = TokenBudget(
        rollout_tokens=15 * STEP_TOKENS + 4 * LOOK_TOKENS,
        gradient_tokens=updates * 4 * (2 + 4 - 1 + 3 + 4 - 1),
    )
    assert improved[0].budget == expected


def test_a_step_depends_only_on_key_step_and_state(params, improved):
    out, states = improved
    sampler = RolloutSampler(MODEL, params, **DRAWS)
    drawn = sampler.draw(states[2], prompts_at(3), jax.random.fold_in(KEY, 3))
    again = make_policy_batch(drawn, sevens, group=GROUP)
    assert again.rewards.mean() == out.history[3]["reward"] > 0


def test_a_source_of_your_own_may_give_dicts(params):
    rows = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    fields = {"tokens": rows, "mask": np.ones((2, 3), np.float32), "anchor": rows[:1]}
    loss = distillation_loss(MODEL, params, imitation=0.5, anchor=1.0)

    class Source(StateBatchSource):
        def __init__(self, make):
            super().__init__()
            self.make = make

        def batch(self, state, step):
            return self.make(**fields)

    found = []
    for make in (dict, Batch):
        loop = start_tuning(
            MODEL,
            loss,
            None,
            tx=None,
            statistics=None,
            learning_rate=0.1,
            on_step=None,
        )
        found.append(loop.run(Source(make), 1))
    assert found[0].history == found[1].history
    (entry,) = found[0].history
    # The start state is the base, from which it is no distance.
    assert entry["loss"] == pytest.approx(0.5 * entry["loss_nats"], rel=1e-5)
    # Adam with b1 0.9 and b2 0.99 averages a tenth of g, and a hundredth of g x g.
    adam = loop._train.opt_state[0]
    np.testing.assert_allclose(adam.nu.wkv, np.square(adam.mu.wkv), rtol=1e-4)
    assert found[0].budget == found[1].budget == TokenBudget(gradient_tokens=6 + 3)


def test_without_held_out_prompts_a_full_window_of_recent_rewards_decides():
    loop = TuningLoop(print, TrainState.create(init_state(CONFIG), optax.identity()))
    target = RewardTarget(None, 2, 0.5)
    reached = []
    for reward in (1.0, 0.0, 0.25, 0.75):
        loop.history.append({"reward": reward})
        reached.append(target.reached(loop, {}, last=False))
    assert reached == [False, True, False, True]


def test_uniform_groups_skip_the_update(params):
    same = lambda prompt, completion: len(prompt)  # noqa: E731
    out = grpo(**loop_arguments(params, same), steps=3, stop_reward=9.0)
    assert [entry["updated"] for entry in out.history] == [0, 0, 0]
    assert not np.any(out.state.wkv)
    assert out.budget == TokenBudget(rollout_tokens=3 * STEP_TOKENS)


def test_grpo_stops_at_the_target_reward(params):
    enough = lambda prompt, completion: 1.0  # noqa: E731
    arguments = loop_arguments(params, enough)
    out = grpo(**arguments, evaluate_every=3)
    assert len(out.history) == 3
    out = grpo(**arguments, held_out=HELD_OUT)
    assert out.history == [{"step": 0, "held_out": 1.0}]
    assert out.budget == TokenBudget(rollout_tokens=LOOK_TOKENS)


def test_expert_iteration_learns_from_approved_completions(params):
    choices = {"rounds": 5, "keep_reward": 0.5, "updates": 5, "batch_size": 8}
    choices |= {"held_out": HELD_OUT, "learning_rate": 0.5}
    out = expert_iteration(**loop_arguments(params), **choices)
    seen = [entry["held_out"] for entry in out.history]
    print(f"held-out reward {seen}; {out.budget}")
    assert seen[-1] > seen[0] + 0.2
    assert len(set(out.traces)) == len(out.traces) == out.history[-2]["kept"]
    assert all(sevens(trace.prompt, trace.completion) >= 0.5 for trace in out.traces)
    assert out.budget.rollout_tokens == 5 * STEP_TOKENS + 6 * LOOK_TOKENS


def test_distill_lowers_the_loss_on_traces(params):
    traces = [Trace((1, n), (7, n, 7, 0)) for n in range(2, 9)]
    out = distill(MODEL, params, traces, steps=30, batch_size=8, length=16)
    nats = [entry["loss_nats"] for entry in out.history]
    print(f"nats {nats[0]:.3g} -> {nats[-1]:.3g}")
    assert nats[-1] < 0.6 * nats[0]
    assert out.budget == TokenBudget(gradient_tokens=30 * 8 * 5)


@pytest.mark.slow
def test_an_anchor_limits_drift_and_counts_in_the_budget(params):
    rng = np.random.default_rng(0)
    drift = []
    text = rng.integers(0, CONFIG.vocab_size, (4, 17)).astype(np.int32)
    for weight in (1e-6, 10.0):
        out = grpo(
            **loop_arguments(params),
            steps=8,
            loss=policy_loss(MODEL, params, kl=0.01, anchor=weight),
            anchor_at=lambda step: text,
            learning_rate=0.5,
        )
        updated = [entry for entry in out.history if entry["updated"]]
        drift.append(updated[-1]["anchor_nats"])
        assert updated[-1]["kl_nats"] > 0
        assert out.budget.gradient_tokens == len(updated) * (44 + 4 * 16)
    assert drift[1] < 0.5 * drift[0]


@pytest.mark.parametrize("method", ["distil", "grpo", "expert"])
def test_loops_tune_an_upscaled_memory_by_default(params, method):
    text = np.arange(66).reshape(2, 33) % CONFIG.vocab_size
    start = upscale(MODEL, params, text, size=8)
    arguments = loop_arguments(params, reward=lambda prompt, drawn: 1.0 + drawn[0])
    if method == "distil":
        traces = [Trace((1, 2), (7, 3, 7, 0))]
        out = distill(MODEL, params, traces, steps=1, batch_size=1, state=start)
    elif method == "grpo":
        out = grpo(**arguments, steps=1, state=start)
    else:
        out = expert_iteration(**arguments, rounds=1, updates=1, state=start)
    assert np.any(out.state.upscaled.memory) and not np.any(out.state.wkv)


@pytest.mark.parametrize("method", ["distil", "grpo", "expert"])
def test_loops_support_a_decorrelating_optimizer(params, method):
    mask = trainable_mask(init_state(CONFIG), ("wkv",))
    arguments = loop_arguments(params, reward=lambda prompt, drawn: 1.0 + drawn[0])

    def tuned(**choices):
        if method == "distil":
            traces = [Trace((1, 2), (7, 3, 7, 0))]
            return distill(MODEL, params, traces, steps=1, batch_size=1, **choices)
        if method == "grpo":
            return grpo(**arguments, steps=1, **choices)
        return expert_iteration(**arguments, rounds=1, updates=1, **choices)

    tx = optax.masked(decorrelate(optax.sgd(0.1)), mask)
    with pytest.raises(ValueError, match="`statistics` must be given"):
        tuned(tx=tx)
    out = tuned(tx=tx, statistics=state_statistics(MODEL, params))
    plain = tuned(tx=optax.masked(optax.sgd(0.1), mask))
    assert np.isfinite(out.state.wkv).all()
    assert np.any(out.state.wkv != plain.state.wkv)


@pytest.mark.slow
def test_an_upscaled_memory_earns_reward_with_fixed_features(params):
    text = (
        np.random.default_rng(0)
        .integers(0, CONFIG.vocab_size, (8, 33))
        .astype(np.int32)
    )
    start = upscale(MODEL, params, text, size=24)
    out = grpo(
        **loop_arguments(params),
        state=start,
        steps=30,
        loss=policy_loss(MODEL, params, leaves=("memory",)),
        learning_rate=0.5,
        held_out=HELD_OUT,
        stop_reward=2.0,
    )
    seen = [entry["held_out"] for entry in out.history if "held_out" in entry]
    print(f"held-out reward {seen}")
    assert seen[-1] > seen[0] + 0.1
    assert np.abs(out.state.upscaled.memory).max() > 0.5 and not np.any(out.state.wkv)
    features = start.upscaled.features, out.state.upscaled.features
    jax.tree.map(np.testing.assert_array_equal, *features)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"group": 0}, ValueError, "`group` must be at least 1"),
        ({"tokens": 0}, ValueError, "`tokens` must be at least 1"),
        ({"length": 7}, ValueError, "`length` must be at least 8"),
        ({"key": None}, ValueError, "`key` must be given unless `temperature` is 0"),
        ({"key": 7}, TypeError, "`key` must be a random key; got int"),
        ({"temperature": -1.0}, ValueError, "`temperature` must be from 0"),
        ({"stop_ids": (13,)}, ValueError, "`stop_ids` must hold ids .* got 13"),
        ({"prompts": [[1], [2, -1]]}, ValueError, "`prompts` row 1 must hold ids"),
        ({"prompts": [[1.5]]}, TypeError, "`prompts` row 0 must hold integers"),
    ],
)
def test_invalid_rollout_arguments_are_rejected(
    params, unchecked, change, error, message
):
    with pytest.raises(error, match=rf"RolloutSampler(\.draw)?: {message}"):
        draw(params, **change)


def test_invalid_loop_arguments_are_rejected(params, unchecked):
    for change, error, message in [
        (
            {"sampler": RolloutSampler(MODEL, params, group=1, tokens=4)},
            ValueError,
            "`group` must be at least 2",
        ),
        ({"steps": -1}, ValueError, "`steps` must be at least 0"),
        (
            {"loss": policy_loss(MODEL, params, anchor=1.0)},
            ValueError,
            "`anchor_at` and the weight `anchor` of `loss` must be given together",
        ),
        (
            {"loss": policy_loss(MODEL, params, temperature=0.5)},
            ValueError,
            "`loss` must have the temperature of `sampler`, 1.0; got 0.5",
        ),
        (
            {"loss": distillation_loss(MODEL, params)},
            TypeError,
            "`loss` must be made by policy_loss; got _DistillationLoss",
        ),
        ({"reward": 3}, TypeError, "`reward` must be a function; got int"),
        ({"prompts_at": [[1]]}, TypeError, "`prompts_at` must be a function; got list"),
        (
            {"state": init_state(CONFIG, 2)},
            ValueError,
            r"`state\.att_shift` must have shape",
        ),
    ]:
        with pytest.raises(error, match=f"grpo: {message}"):
            grpo(**(loop_arguments(params) | change))
    with pytest.raises(
        ValueError, match=r"^grpo: `reward` of prompt 1 must be finite; got nan"
    ):
        grpo(**loop_arguments(params, lambda p, c: 1.0 if len(p) == 2 else np.nan))
    with pytest.raises(
        ValueError, match="expert_iteration: `updates` must be at least 1"
    ):
        expert_iteration(**loop_arguments(params), updates=0)
    traces = [Trace((1,), (2,)), Trace((1,), (13,))]
    with pytest.raises(ValueError, match=r"distill: `traces\[1\]` must .* got 13 at"):
        distill(MODEL, params, traces)
    with pytest.raises(
        ValueError, match="distill: `traces` must hold at least one trace"
    ):
        distill(MODEL, params, [])
