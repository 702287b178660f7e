"""Measures a model and a start state, and gives advice. Never trains."""

from rwkv7_jax.evaluation.advice import (
    Diagnosis,
    MemoryStatistics,
    RetentionScore,
    advise,
)
from rwkv7_jax.evaluation.metric import Metric
from rwkv7_jax.evaluation.scoring import (
    Answers,
    Score,
    score,
    score_answers,
    token_nats,
)
from rwkv7_jax.evaluation.state_diagnosis import diagnose, ranks, retention

# `head_statistics` is not exported here: the function has the same name as its module.
__all__ = [
    "Answers",
    "Diagnosis",
    "MemoryStatistics",
    "Metric",
    "RetentionScore",
    "Score",
    "advise",
    "diagnose",
    "ranks",
    "retention",
    "score",
    "score_answers",
    "token_nats",
]
