"""Tuning at test time: arguments that are right, and values that must be refused."""

import dataclasses

import numpy as np
from misuse_values import (
    BATCH,
    BYTES,
    CONFIG,
    IDS,
    INF,
    KEY,
    MODEL,
    NAN,
    NO_BATCHES,
    NO_FUNCTIONS,
    NO_KEYS,
    NO_NUMBERS,
    NO_PLACES,
    OTHER_PARAMS,
    OTHER_STATES,
    PARAMS,
    STATE,
    WRONG_MODEL,
    WRONG_PARAMS,
    WRONG_STATE,
    PublicFunction,
    count,
    number,
)

import rwkv7_jax as rwkv
from rwkv7_jax.test_time.completion_cache import CompletionCache
from rwkv7_jax.test_time.distillation import TraceBatches, distill
from rwkv7_jax.test_time.expert_iteration import ExpertBatches, expert_iteration
from rwkv7_jax.test_time.grpo import PolicyBatches, grpo
from rwkv7_jax.test_time.losses import (
    context_distillation,
    distillation_loss,
    policy_loss,
)
from rwkv7_jax.test_time.questions import QuestionSet, find_verifier, read_questions
from rwkv7_jax.test_time.rewarded_rollouts import make_policy_batch
from rwkv7_jax.test_time.rewards import advantages
from rwkv7_jax.test_time.rollouts import RolloutSampler
from rwkv7_jax.test_time.teacher import collect_traces
from rwkv7_jax.test_time.traces import (
    Trace,
    completion_rows,
    gradient_tokens,
    longest_trace,
    read_traces,
    trace_batch,
    write_traces,
)

TRACE = Trace([1, 2], [3, 0])
PROMPTS = [[1], [2, 3]]
SMALL = dataclasses.replace(CONFIG, vocab_size=24)


def prompts_at(step):
    return PROMPTS


def reward(prompt, completion):
    return 1.0


MODELS = {"model": MODEL, "params": PARAMS}
WRONG_MODELS = {"model": WRONG_MODEL, "params": WRONG_PARAMS}
START = {TypeError: ["a.pth", {}, [STATE]], ValueError: OTHER_STATES}
LEAVES = {TypeError: ["wkv", None], ValueError: [(), ("w",)]}
WRONG_PROMPTS = {
    TypeError: [None, "text", [1, 2], [[0.5]]],
    ValueError: [[], [[]], [[257]], [[-1]]],
}
DRAWS = {
    "group": count(1),
    "tokens": count(1),
    "temperature": number(),
    "stop_ids": {TypeError: [None, "0", 0], ValueError: [[257], [-1]]},
    "length": {TypeError: [1.5, "2"], ValueError: [0]},
    "stop_strings": {TypeError: ["ab", 3, [1]], ValueError: [[""], ["a"]]},
    "tokenizer": {TypeError: [3, "bytes"]},
}
SAMPLER = RolloutSampler(MODEL, PARAMS, group=2, tokens=2)
NO_SAMPLER = {TypeError: [None, MODEL]}
LOOP = {"sampler": SAMPLER, "prompts_at": prompts_at, "reward": reward, "key": KEY}
WRONG_LOOP = {
    "sampler": NO_SAMPLER,
    "prompts_at": NO_FUNCTIONS,
    "reward": NO_FUNCTIONS,
    "key": NO_KEYS,
    "state": START,
    "loss": {TypeError: [1.0, "policy"]},
    "learning_rate": number(),
    "tx": {TypeError: [0.1, "adam"]},
    "held_out": {TypeError: [[1, 2]], ValueError: [[[]], [[257]]]},
    "stop_reward": {TypeError: NO_NUMBERS, ValueError: [NAN]},
    "on_step": {TypeError: [1, "print"]},
}
WRONG_TRACES = {
    TypeError: [None, TRACE, "traces.jsonl", [[1, 2]], [None]],
    ValueError: [[], [dataclasses.replace(TRACE, weight=0.0)]],
}

FUNCTIONS = {
    "distillation_loss": PublicFunction(
        distillation_loss,
        MODELS,
        {
            **WRONG_MODELS,
            "teacher_params": {ValueError: [PARAMS]},
            "teacher": {ValueError: [MODEL]},
            "teacher_state": {ValueError: [STATE]},
            "imitation": number(),
            "kl": number(),
            "leaves": LEAVES,
            "anchor": number(),
        },
    ),
    "distillation_loss of a teacher": PublicFunction(
        distillation_loss,
        {**MODELS, "teacher": MODEL, "teacher_params": PARAMS},
        {
            "teacher": {
                TypeError: [CONFIG, PARAMS, "model.pth"],
                ValueError: [rwkv.RWKV7(SMALL)],
            },
            "teacher_params": {
                TypeError: ["model.pth", [PARAMS]],
                ValueError: OTHER_PARAMS,
            },
            "teacher_state": START,
        },
    ),
    "context_distillation": PublicFunction(
        context_distillation,
        {**MODELS, "context": STATE},
        {
            "model": WRONG_MODEL,
            "params": WRONG_PARAMS,
            "context": WRONG_STATE,
            "leaves": LEAVES,
        },
    ),
    "policy_loss": PublicFunction(
        policy_loss,
        MODELS,
        {
            **WRONG_MODELS,
            "temperature": number(0),
            "kl": number(),
            "reference": START,
            "leaves": LEAVES,
            "anchor": number(),
            "epsilon_low": number(1.5),
            "epsilon_high": number(),
        },
    ),
    "RolloutSampler.draw": PublicFunction(
        SAMPLER.draw,
        {"state": None, "prompts": PROMPTS, "key": KEY},
        {
            "state": START,
            "prompts": WRONG_PROMPTS,
            "key": {TypeError: [1, "key"], ValueError: [None]},
        },
    ),
    "RolloutSampler.greedy_rewards": PublicFunction(
        SAMPLER.greedy_rewards,
        {"state": None, "prompts": PROMPTS, "reward": reward},
        {"reward": NO_FUNCTIONS},
    ),
    "RolloutSampler.mean_reward": PublicFunction(
        SAMPLER.mean_reward,
        {"state": None, "prompts": PROMPTS, "reward": reward},
        {"reward": NO_FUNCTIONS},
    ),
    "RolloutSampler": PublicFunction(
        RolloutSampler, {**MODELS, "group": 2, "tokens": 2}, {**WRONG_MODELS, **DRAWS}
    ),
    "make_policy_batch": PublicFunction(
        make_policy_batch,
        {"drawn": None, "reward": reward, "group": 2},
        {"drawn": {TypeError: [None, BATCH, PROMPTS]}},
    ),
    "grpo": PublicFunction(
        grpo,
        LOOP,
        {
            **WRONG_LOOP,
            "steps": count(0),
            "loss": {
                TypeError: [1.0, distillation_loss(MODEL, PARAMS)],
                ValueError: [policy_loss(MODEL, PARAMS, temperature=2.0)],
            },
            "anchor_at": {ValueError: [prompts_at]},
            "evaluate_every": count(1),
            "updates": count(1),
            "importance_cap": {TypeError: ["2"], ValueError: [0.0, -1.0, NAN]},
        },
    ),
    "expert_iteration": PublicFunction(
        expert_iteration,
        LOOP,
        {
            **WRONG_LOOP,
            "rounds": count(0),
            "keep_reward": {TypeError: ["1"], ValueError: [NAN, INF]},
            "updates": count(1),
            "batch_size": count(1),
        },
    ),
    "PolicyBatches": PublicFunction(
        PolicyBatches,
        {"sampler": SAMPLER, "prompts_at": prompts_at, "reward": reward, "key": KEY},
        {
            "sampler": NO_SAMPLER,
            "prompts_at": NO_FUNCTIONS,
            "reward": NO_FUNCTIONS,
            "key": NO_KEYS,
            "anchor_at": {TypeError: [IDS, "poems.jsonl"]},
        },
    ),
    "ExpertBatches": PublicFunction(
        ExpertBatches,
        {"sampler": SAMPLER, "prompts_at": prompts_at, "reward": reward, "key": KEY},
        {
            "sampler": NO_SAMPLER,
            "prompts_at": NO_FUNCTIONS,
            "reward": NO_FUNCTIONS,
            "key": NO_KEYS,
            "updates": count(1),
            "batch_size": count(1),
        },
    ),
    "TraceBatches": PublicFunction(
        TraceBatches,
        {"traces": [TRACE]},
        {
            "traces": WRONG_TRACES,
            "batch_size": count(1),
            "length": {TypeError: [1.5, "9"], ValueError: [-1, 2]},
            "seed": count(0),
        },
    ),
    "distill": PublicFunction(
        distill,
        {**MODELS, "traces": [TRACE]},
        {
            **WRONG_MODELS,
            "traces": WRONG_TRACES,
            "steps": count(0),
            "batch_size": count(1),
            "length": {TypeError: [1.5], ValueError: [-1, 2]},
            "seed": count(0),
            "state": START,
            "loss": {TypeError: [1.0, "distil"]},
            "learning_rate": number(),
            "tx": {TypeError: [0.1, "adam"]},
            "on_step": {TypeError: [1, "print"]},
        },
    ),
    "collect_traces": PublicFunction(
        collect_traces,
        {"teacher": SAMPLER, "prompts": PROMPTS, "key": KEY},
        {
            "teacher": NO_SAMPLER,
            "prompts": WRONG_PROMPTS,
            "key": NO_KEYS,
            "state": START,
            "template": {TypeError: [1, "{}"]},
            "verify": {TypeError: [1, "exact"]},
            "vote": {TypeError: [1, (reward,), reward], ValueError: [(reward, 2.0)]},
            "source": {TypeError: [None, 3]},
            "at_once": count(1),
            "on_progress": {TypeError: [1, "print"]},
        },
    ),
    "completion_rows": PublicFunction(
        completion_rows,
        {"prompts": [[1], [2]], "completions": [[3], [4, 0]], "length": 4},
        {
            "prompts": {
                TypeError: [None, "ab", [1, 2], [[0.5], [1]]],
                # An empty prompt would move the mask to the row's end.
                ValueError: [[], [[], [1]], [[1], [-2]]],
            },
            "completions": {
                TypeError: [None, "ab", [[0.5], [1]]],
                ValueError: [[[3]], [[3], [-4]], [[3]] * 3],
            },
            "length": count(1, 1),
            "weights": {
                TypeError: [1.0, "ab", ["a", "b"]],
                ValueError: [[1.0], [NAN, 1.0], [-1.0, 1.0]],
            },
        },
    ),
    "trace_batch": PublicFunction(
        trace_batch,
        {"traces": [TRACE], "step": 0, "batch_size": 2, "length": 4},
        {
            "traces": {ValueError: [[]]},
            "step": count(0),
            "batch_size": count(1),
            "length": count(1, 2),
            "seed": count(0),
        },
    ),
    "longest_trace": PublicFunction(
        longest_trace, {"traces": [TRACE]}, {"traces": WRONG_TRACES}
    ),
    "gradient_tokens": PublicFunction(
        gradient_tokens,
        {"batch": BATCH},
        {"batch": {TypeError: NO_BATCHES, ValueError: [{}, {"tokens": IDS}]}},
    ),
    "write_traces": PublicFunction(
        write_traces,
        {"path": "traces.jsonl", "traces": [TRACE]},
        {"path": NO_PLACES, "traces": {TypeError: [[[1, 2]], [None]]}},
    ),
    "read_traces": PublicFunction(
        read_traces, {"path": "traces.jsonl"}, {"path": NO_PLACES}
    ),
    "CompletionCache": PublicFunction(
        CompletionCache, {"path": "cache.jsonl"}, {"path": NO_PLACES}
    ),
    "read_questions": PublicFunction(
        read_questions,
        {"path": "questions.jsonl", "tokenizer": BYTES},
        {"path": NO_PLACES, "tokenizer": {TypeError: [None, "world"]}},
    ),
    "QuestionSet": PublicFunction(
        QuestionSet,
        {"path": "task:dictionary", "tokenizer": BYTES},
        {
            "path": {TypeError: [None, 3, ["a"]]},
            "tokenizer": {TypeError: [None, "world"]},
            "seed": count(0),
            "held_out": {TypeError: NO_NUMBERS, ValueError: [NAN, -0.1, 1.5]},
            "evaluation": {TypeError: [3, ["a"]]},
        },
    ),
    "find_verifier": PublicFunction(
        find_verifier, {"name": "exact"}, {"name": {TypeError: [None, 3, reward]}}
    ),
    "advantages": PublicFunction(
        advantages,
        {"rewards": np.ones((2, 3))},
        {
            "rewards": {
                TypeError: [None, "all", {}],
                ValueError: [np.ones(3), np.ones((2, 0)), [[NAN, 1.0]], [[1], [2, 3]]],
            }
        },
    ),
}
