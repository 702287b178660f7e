"""Evaluation and measurements: arguments that are right, and values that must be refused."""

import numpy as np
from misuse_values import (
    BAD_BATCHES,
    BATCH,
    BYTES,
    IDS,
    MODEL,
    NO_STATES,
    NOTHING_COUNTS,
    PARAMS,
    STATE,
    THREE,
    WRONG_BATCHES,
    WRONG_MODEL,
    WRONG_PARAMS,
    WRONG_STATE,
    PublicFunction,
    count,
)

import rwkv7_jax as rwkv
from rwkv7_jax.evaluation.advice import advise
from rwkv7_jax.evaluation.head_statistics import head_statistics
from rwkv7_jax.evaluation.metric import Metric
from rwkv7_jax.evaluation.scoring import score_answers, token_nats
from rwkv7_jax.evaluation.state_diagnosis import diagnose, ranks, retention
from rwkv7_jax.tuning.state_arithmetic import capacity, singular_values

MEASURED = {"model": MODEL, "params": PARAMS, "state": STATE}
WRONG = {"model": WRONG_MODEL, "params": WRONG_PARAMS, "state": WRONG_STATE}
MATRICES = {
    TypeError: [None, "wkv", STATE],
    ValueError: [np.zeros((2, 3)), np.zeros((2, 3, 2, 16, 16))],
}
ONE_STATE = {"state": {TypeError: NO_STATES, ValueError: [THREE]}}

FUNCTIONS = {
    "score": PublicFunction(
        rwkv.score,
        {**MEASURED, "batch": BATCH, "tokenizer": BYTES},
        {
            **WRONG,
            "batch": WRONG_BATCHES,
            "tokenizer": {TypeError: [None, "bytes", 257]},
        },
    ),
    "token_nats": PublicFunction(
        token_nats,
        {**MEASURED, "tokens": IDS},
        {
            **WRONG,
            "tokens": {
                TypeError: [None, "text", IDS * 1.0],
                ValueError: [IDS[0], IDS - 1, IDS + 250, IDS[:, :1]],
            },
            "rows": count(1),
        },
    ),
    "score_answers": PublicFunction(
        score_answers,
        {**MEASURED, "batch": BATCH},
        {**WRONG, "batch": WRONG_BATCHES, "rows": count(1)},
    ),
    "retention": PublicFunction(
        retention,
        {**MEASURED, "batches": {"other": BATCH}},
        {
            **WRONG,
            "batches": {
                TypeError: [
                    None,
                    [BATCH],
                    "poems.jsonl",
                    rwkv.data.Batch(**BATCH),
                    {"other": None},
                ],
                ValueError: [{"other": bad} for bad in [*BAD_BATCHES, NOTHING_COUNTS]],
            },
        },
    ),
    "diagnose": PublicFunction(
        diagnose,
        {**MEASURED, "batch": BATCH},
        {
            **WRONG,
            "batch": WRONG_BATCHES,
            "generic": {
                TypeError: [IDS, [BATCH], "poems.jsonl"],
                ValueError: [{}, NOTHING_COUNTS, BATCH | {"tokens": IDS + 250}],
            },
        },
    ),
    "ranks": PublicFunction(ranks, {"memory": STATE.wkv}, {"memory": MATRICES}),
    "singular_values": PublicFunction(
        singular_values, {"memory": STATE.wkv}, {"memory": MATRICES}
    ),
    "head_statistics": PublicFunction(head_statistics, {"state": STATE}, ONE_STATE),
    "capacity": PublicFunction(capacity, {"state": STATE}, ONE_STATE),
    "advise": PublicFunction(advise, {}, {"diagnosis": {TypeError: [None, {}, STATE]}}),
    "Metric.of": PublicFunction(
        Metric.of,
        {"value": 1.0, "unit": "nats"},
        {"unit": {ValueError: ["bits", None, 3]}},
    ),
}
