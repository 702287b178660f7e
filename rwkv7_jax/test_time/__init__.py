"""Tunes start states at test time, from rewards or from a teacher.

Every method is a source of batches (`StateBatchSource`), which both `TuningLoop` and train.py use.
Import the functions `grpo` and `expert_iteration` from their modules: as attributes of this package
they would hide the modules of the same names.
"""

from rwkv7_jax.test_time.completion_cache import CompletionCache
from rwkv7_jax.test_time.distillation import TraceBatches, distill
from rwkv7_jax.test_time.expert_iteration import ExpertBatches
from rwkv7_jax.test_time.grpo import PolicyBatches
from rwkv7_jax.test_time.losses import (
    context_distillation,
    distillation_loss,
    policy_loss,
)
from rwkv7_jax.test_time.questions import QuestionSet, find_verifier, read_questions
from rwkv7_jax.test_time.rewarded_rollouts import PolicyBatch, make_policy_batch
from rwkv7_jax.test_time.rewards import (
    AdvantageRule,
    RewardFunction,
    advantages,
    evaluate_rewards,
)
from rwkv7_jax.test_time.rollouts import Rollouts, RolloutSampler
from rwkv7_jax.test_time.teacher import collect_traces
from rwkv7_jax.test_time.traces import (
    TokenBudget,
    Trace,
    check_trace_tokens,
    completion_rows,
    gradient_tokens,
    longest_trace,
    read_traces,
    trace_batch,
    write_traces,
)
from rwkv7_jax.test_time.tuning_loop import (
    Result,
    RewardTarget,
    StateBatchSource,
    TuningLoop,
    start_tuning,
)
from rwkv7_jax.test_time.verifiers import VERIFIERS

__all__ = [
    "VERIFIERS",
    "AdvantageRule",
    "CompletionCache",
    "ExpertBatches",
    "PolicyBatch",
    "PolicyBatches",
    "QuestionSet",
    "Result",
    "RewardFunction",
    "RewardTarget",
    "RolloutSampler",
    "Rollouts",
    "StateBatchSource",
    "TokenBudget",
    "Trace",
    "TraceBatches",
    "TuningLoop",
    "advantages",
    "check_trace_tokens",
    "collect_traces",
    "completion_rows",
    "context_distillation",
    "distill",
    "distillation_loss",
    "evaluate_rewards",
    "find_verifier",
    "gradient_tokens",
    "longest_trace",
    "make_policy_batch",
    "policy_loss",
    "read_questions",
    "read_traces",
    "start_tuning",
    "trace_batch",
    "write_traces",
]
