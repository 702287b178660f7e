"""Stop strings at test time end completions and are trained on, but rewards do not see them."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import TINIEST, lively

from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.test_time.expert_iteration import expert_iteration
from rwkv7_jax.test_time.grpo import PolicyBatches, grpo
from rwkv7_jax.test_time.rollouts import RolloutSampler
from rwkv7_jax.test_time.teacher import collect_traces
from rwkv7_jax.text.tokenizer import Tokenizer

CONFIG = dataclasses.replace(TINIEST, vocab_size=257, num_layers=1)
MODEL = RWKV7(CONFIG)
TOKENIZER = Tokenizer.bytes()
PROMPTS = [[40, 41], [60, 61, 62]]
# One byte in eight, so that most completions of 24 bytes hold one of them.
STOPS = tuple(chr(number) for number in range(8, 128, 8))
STOP_IDS = (3,)
ENDS = {"stop_ids": STOP_IDS, "stop_strings": STOPS, "tokenizer": TOKENIZER}
KEY = jax.random.key(2)


@pytest.fixture(scope="module")
def params():
    return lively(CONFIG)


def sampler_of(params, **ends):
    return RolloutSampler(MODEL, params, group=4, tokens=24, **ends)


@pytest.fixture(scope="module")
def free(params):
    return sampler_of(params, stop_ids=STOP_IDS).draw(None, PROMPTS, KEY)


@pytest.fixture(scope="module")
def stopped(params):
    return sampler_of(params, **ENDS).draw(None, PROMPTS, KEY)


def cut_by_hand(completion):
    """Return a completion up to its first stop, and the part before the stop."""
    for place, number in enumerate(completion):
        if TOKENIZER.decode([number]) in STOPS and number not in STOP_IDS:
            return completion[: place + 1], completion[:place]
    return completion, completion


def test_a_rollout_ends_with_a_stop_string_hidden_from_the_reward(free, stopped):
    pairs = [cut_by_hand(completion) for completion in free.completions]
    assert stopped.completions == [learnt for learnt, _ in pairs]
    assert stopped.judged == [judged for _, judged in pairs]
    assert sum(learnt != judged for learnt, judged in pairs) > 4


def test_stop_string_tokens_are_targets(stopped):
    assert stopped.mask.sum() == sum(map(len, stopped.completions))
    assert stopped.logps.shape == stopped.mask.shape
    assert not np.any(stopped.logps[stopped.mask == 0])
    assert np.all(stopped.logps[stopped.mask > 0] < 0)


def test_without_stop_strings_a_reward_sees_the_full_completion(free):
    assert free.judged == free.completions


def test_a_stop_id_takes_precedence_over_a_stop_string(params):
    sampler = RolloutSampler(
        MODEL,
        params,
        group=1,
        tokens=8,
        stop_ids=(TOKENIZER.encode("b")[0],),
        stop_strings=("ab",),
        tokenizer=TOKENIZER,
    )
    ended = tuple(TOKENIZER.encode("xab"))
    assert sampler.judged(ended) == ended
    assert not sampler.is_cut(ended)


class Recorder:
    """A reward for completions of odd length that records what it is shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, prompt, completion):
        self.shown.append(completion)
        return float(len(completion) % 2)

    @property
    def saw_a_stop(self):
        texts = [TOKENIZER.decode([i for i in row if i]) for row in self.shown]
        return any(stop in text for stop in STOPS for text in texts)


@pytest.mark.slow
def test_no_training_loop_shows_a_stop_string_to_the_reward(params):
    sampler = sampler_of(params, **ENDS)
    loops = {
        "grpo": lambda reward: grpo(
            sampler,
            lambda step: PROMPTS,
            reward,
            key=KEY,
            steps=1,
            held_out=PROMPTS,
        ),
        "expert iteration": lambda reward: expert_iteration(
            sampler,
            lambda step: PROMPTS,
            reward,
            key=KEY,
            rounds=1,
            updates=1,
            batch_size=4,
            held_out=PROMPTS,
        ),
        "traces": lambda reward: collect_traces(
            sampler, PROMPTS, key=KEY, verify=reward
        ),
        "held out": lambda reward: sampler.mean_reward(None, PROMPTS, reward),
    }
    for name, loop in loops.items():
        reward = Recorder()
        loop(reward)
        assert len(reward.shown) >= 2, name
        assert not reward.saw_a_stop, name


def test_new_and_cached_traces_include_the_stop_string(params, tmp_path):
    cache = tmp_path / "cache.jsonl"
    cached = {"key": KEY, "cache": cache, "teacher_hash": "tiny"}
    for attempt in range(2):
        seen = Recorder()
        traces, _ = collect_traces(
            sampler_of(params, **ENDS), PROMPTS, verify=seen, **cached
        )
        assert not seen.saw_a_stop, attempt
        texts = [TOKENIZER.decode([i for i in one.completion if i]) for one in traces]
        assert any(text.endswith(STOPS) for text in texts), attempt
    # Other stop strings are other completions.
    lines = cache.read_text().count("\n")
    collect_traces(sampler_of(params, stop_ids=STOP_IDS), PROMPTS, **cached)
    assert cache.read_text().count("\n") == 2 * lines


def test_a_completion_that_ends_in_a_stop_string_is_not_truncated(params, stopped):
    sampler = sampler_of(params, **ENDS)
    source = PolicyBatches(
        sampler, lambda step: PROMPTS, lambda p, c: float(len(c)), key=KEY
    )
    source.batch(init_state(CONFIG), 0)
    drawn = sampler.draw(None, PROMPTS, jax.random.fold_in(KEY, 0))
    full = [len(row) == 24 for row in drawn.completions]
    expected = [
        is_full
        and cut_by_hand(row)[0] == cut_by_hand(row)[1]
        and row[-1] not in STOP_IDS
        for is_full, row in zip(full, drawn.completions, strict=True)
    ]
    assert source.metrics["cut_completions"] == np.mean(expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stop_strings": "ab"}, TypeError, "`stop_strings` must be a list of strings"),
        (
            {"stop_strings": ("",)},
            ValueError,
            "`stop_strings` must hold no empty string",
        ),
        (
            {"tokenizer": None},
            ValueError,
            "`tokenizer` must be given with `stop_strings`",
        ),
        ({"tokenizer": 3}, TypeError, "`tokenizer` must be a Tokenizer; got int"),
    ],
)
def test_invalid_stop_strings_are_rejected_before_sampling(
    params, unchecked, change, error, message
):
    with pytest.raises(error, match=f"RolloutSampler: {message}"):
        sampler_of(params, **(ENDS | change))
