"""Numbers about a model and a state, and advice about them. Never trains."""

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

# The function `head_statistics` is not here: it has the name of its file.
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
