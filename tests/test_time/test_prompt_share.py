"""Processes that share the prompts give together what one process gives for all."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import random_params
from tiny_models import SMALLEST
from tolerances import SAME, assert_close

from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.test_time.expert_iteration import ExpertBatches
from rwkv7_jax.test_time.grpo import PolicyBatches
from rwkv7_jax.test_time.prompt_share import PromptShare
from rwkv7_jax.test_time.rewards import AdvantageRule
from rwkv7_jax.test_time.rollouts import RolloutSampler
from rwkv7_jax.test_time.teacher import collect_traces

MODEL = RWKV7(SMALLEST)
KEY = jax.random.key(4)
STATE = init_state(SMALLEST)
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
GROUP = 3
TIMEOUT = 120


@pytest.fixture(scope="module")
def params():
    return random_params(SMALLEST, dtype=jnp.float32, scale=0.3)


def even_sum(prompt, completion):
    return float((sum(prompt) + sum(completion)) % 2)


def in_processes(work, *, together=False, count=2):
    """Return the results of several processes, simulated by threads that exchange texts."""
    barrier = threading.Barrier(count)
    said = [""] * count

    def run(index):
        def gather(make):
            said[index] = json.dumps(make())
            barrier.wait(TIMEOUT)
            found = [json.loads(text) for text in said]
            barrier.wait(TIMEOUT)
            return found

        return work(PromptShare(index, count, together, gather), index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def policy(params, share):
    sampler = RolloutSampler(MODEL, params, GROUP, 4, share=share)
    return PolicyBatches(
        sampler,
        lambda step: PROMPTS,
        even_sum,
        key=KEY,
        rule=AdvantageRule(average="constant"),
        redraws=1,
        several_updates=True,
        # Below all ratios, which are 1 to rounding.
        importance_cap=0.9,
    )


def expert(params, share):
    sampler = RolloutSampler(MODEL, params, GROUP, 4, share=share)
    return ExpertBatches(sampler, lambda step: PROMPTS, even_sum, key=KEY)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("make", [policy, expert])
def test_all_processes_together_match_a_single_process(params, make, together):
    alone = make(params, PromptShare())
    whole = alone.batch(STATE, 1)

    def draw(share, index):
        source = make(params, share)
        return source.batch(STATE, 1), source

    found = in_processes(draw, together=together)
    for batch, source in found:
        assert source.metrics.keys() == alone.metrics.keys()
        for name, value in alone.metrics.items():
            assert source.metrics[name] == pytest.approx(value, rel=1e-5), name
        # Where all draw all of them, each has all rows; otherwise its own alone.
        assert len(batch.tokens) == len(whole.tokens) // (1 if together else 2)
    parts = [batch for batch, _ in found][: 1 if together else 2]
    for name, values in whole.items():
        joined = np.concatenate([part[name] for part in parts])
        if name in ("tokens", "mask", "advantages"):
            np.testing.assert_array_equal(joined, values, name)
        else:
            assert_close(joined, values, SAME["model"])


@pytest.mark.parametrize("make", [policy, expert])
def test_a_process_may_have_no_prompt_to_judge(params, make):
    alone = make(params, PromptShare())
    whole = alone.batch(STATE, 1)

    def draw(share, index):
        source = make(params, share)
        return source.batch(STATE, 1), source.metrics

    for batch, metrics in in_processes(draw, together=True, count=len(PROMPTS) + 1):
        np.testing.assert_array_equal(batch.tokens, whole.tokens)
        assert metrics == pytest.approx(alone.metrics, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_prompt_belongs_to_one_process(count):
    for prompts in range(9):
        found = []
        for index in range(count):
            found += range(prompts)[PromptShare(index, count).judged(prompts)]
        assert found == list(range(prompts))


@pytest.mark.parametrize("together", [False, True])
def test_each_prompt_is_judged_by_one_process(params, together):
    judged = []

    def measure(share, index):
        def reward(prompt, completion):
            judged.append((index, tuple(prompt)))
            return even_sum(prompt, completion)

        sampler = RolloutSampler(MODEL, params, GROUP, 4, share=share)
        return sampler.mean_reward(STATE, PROMPTS, reward)[0]

    found = in_processes(measure, together=together)
    (alone,) = in_processes(measure, count=1)
    assert found == [alone, alone]
    first = [(0, tuple(prompt)) for prompt in PROMPTS]
    second = [(1, tuple(prompt)) for prompt in PROMPTS]
    assert sorted(judged[: len(PROMPTS)]) == [*first[:2], *second[2:]]


def test_too_few_prompts_are_answered_by_every_process(params):
    def measure(share, index):
        sampler = RolloutSampler(MODEL, params, GROUP, 4, share=share)
        return sampler.mean_reward(STATE, PROMPTS[:1], even_sum)[0]

    (alone,) = in_processes(measure, count=1)
    assert in_processes(measure) == [alone, alone]


def test_teacher_traces_match_one_process_and_are_cached_by_the_first(params, tmp_path):
    answered = []

    def collect(share, index):
        teacher = RolloutSampler(MODEL, params, GROUP, 4, share=share)

        def verify(prompt, completion):
            answered.append(index)
            return even_sum(prompt, completion)

        return collect_traces(
            teacher,
            PROMPTS,
            key=KEY,
            verify=verify,
            cache=tmp_path / f"{share.count}-{index}.jsonl",
            teacher_hash="teacher",
            at_once=3,
        )

    (alone,) = in_processes(collect, count=1)
    answered.clear()
    first, second = in_processes(collect)
    assert first == second == alone
    # Three prompts are answered at once, then one.
    assert answered.count(0) == GROUP and answered.count(1) == 3 * GROUP
    # A run that is continued, of which the second process has no cache any longer.
    (tmp_path / "2-1.jsonl").unlink()
    one = (tmp_path / "2-0.jsonl").read_text()
    assert len(one.splitlines()) == len(PROMPTS)
    assert in_processes(collect) == [alone, alone]
    assert (tmp_path / "2-0.jsonl").read_text() == one
