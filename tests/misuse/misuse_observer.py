"""The observer: arguments that are right, and values that must be refused."""

import numpy as np
from misuse_values import (
    BATCH,
    CONFIG,
    IDS,
    INF,
    KEY,
    MASK,
    MODEL,
    NAN,
    NO_BATCHES,
    NO_KEYS,
    NO_PLACES,
    NO_STATES,
    OTHERS,
    PARAMS,
    STATE,
    THREE,
    WIDER,
    WRONG_MODEL,
    WRONG_PARAMS,
    PublicFunction,
    count,
    number,
)

import rwkv7_jax as rwkv
from rwkv7_jax.observer.evaluation import evaluate_handover, proposal_error
from rwkv7_jax.observer.files import load_observer, observer_info, save_observer
from rwkv7_jax.observer.loss import observer_loss
from rwkv7_jax.observer.observer import (
    Observer,
    init_observer,
    propose,
    state_moments,
)
from rwkv7_jax.observer.prompt_splits import add_prompt_splits, continuations

OBSERVER = Observer(MODEL, CONFIG)
MAPS = {name: np.zeros(shape, np.float32) for name, shape in OBSERVER.shapes.items()}
WEIGHTS = MAPS | {"model": PARAMS}
SPLIT = np.array([1, 2], np.int32)
SPLIT_BATCH = BATCH | {"split": SPLIT}

WRONG_OBSERVER = {TypeError: [None, MODEL, CONFIG, "observer"]}
WRONG_WEIGHTS = {
    TypeError: [None, "observer", [WEIGHTS], WEIGHTS | {"model": None}],
    ValueError: [
        {},
        PARAMS,
        {"params": WEIGHTS},
        WEIGHTS | {"left": np.zeros(3)},
        WEIGHTS | {"model": OTHERS},
    ],
}
WRONG_PROMPTS = {
    TypeError: [None, "text", IDS * 1.0],
    ValueError: [IDS[0], IDS[:0], IDS - 1, IDS + 250],
}
WRONG_LENGTHS = {
    TypeError: ["2", [1.0, 2.0]],
    ValueError: [[1], [-1, 2], [2, 6]],
}
TEACHER = {"teacher": MODEL, "teacher_params": PARAMS}
WRONG_TEACHER = {"teacher": WRONG_MODEL, "teacher_params": WRONG_PARAMS}

FUNCTIONS = {
    "Observer": PublicFunction(
        Observer,
        {"model": MODEL, "teacher": CONFIG},
        {
            "model": {TypeError: [None, CONFIG, PARAMS]},
            "teacher": {TypeError: [None, MODEL, {}]},
        },
    ),
    "init_observer": PublicFunction(
        init_observer,
        {"config": CONFIG, "teacher_config": CONFIG, "key": KEY},
        {
            "config": {TypeError: [None, MODEL, {}]},
            "teacher_config": {TypeError: [None, MODEL, {}]},
            "key": NO_KEYS,
            "bias": {TypeError: ["zeros", STATE], ValueError: [np.zeros(3)]},
        },
    ),
    "add_prompt_splits": PublicFunction(
        add_prompt_splits,
        {"batch": BATCH, "seed": 0, "step": 0},
        {
            "batch": {TypeError: NO_BATCHES, ValueError: [{}, {"mask": MASK}]},
            "seed": count(0),
            "step": count(0),
            "least": count(0, 4),
            "most": {TypeError: [1.5, "2"], ValueError: [-1, 5]},
            "first": count(0),
        },
    ),
    "continuations": PublicFunction(
        continuations,
        {"tokens": IDS, "split": SPLIT, "weights": MASK},
        {
            "split": {
                TypeError: [None, "1", [0.5, 1.0]],
                ValueError: [[1], [-1, 2], [1, 5], np.array([[1, 2]])],
            },
            "weights": {TypeError: [None, "all"]},
        },
    ),
    "observer_loss": PublicFunction(
        observer_loss,
        {"observer": OBSERVER, **TEACHER},
        {
            "observer": WRONG_OBSERVER,
            **WRONG_TEACHER,
            "variance": number(),
            "divergence": number(),
            "answers": number(),
        },
    ),
    "evaluate_handover": PublicFunction(
        evaluate_handover,
        {**TEACHER, "state": STATE, "batch": SPLIT_BATCH},
        {
            **WRONG_TEACHER,
            "state": {
                TypeError: NO_STATES,
                ValueError: [THREE, rwkv.init_state(WIDER)],
            },
            "batch": {
                TypeError: NO_BATCHES,
                ValueError: [
                    BATCH,
                    SPLIT_BATCH | {"split": SPLIT - 2},
                    SPLIT_BATCH | {"split": SPLIT + 9},
                    SPLIT_BATCH | {"tokens": IDS + 250},
                    SPLIT_BATCH | {"mask": 0 * MASK},
                    # Nothing that counts is after a split.
                    SPLIT_BATCH | {"split": SPLIT * 0 + 4},
                ],
            },
        },
    ),
    "proposal_error": PublicFunction(
        proposal_error,
        {"observer": OBSERVER, "params": WEIGHTS, **TEACHER, "tokens": IDS},
        {
            "observer": WRONG_OBSERVER,
            "params": WRONG_WEIGHTS,
            **WRONG_TEACHER,
            "tokens": WRONG_PROMPTS,
            "lengths": WRONG_LENGTHS,
            "variance": {
                TypeError: ["own"],
                ValueError: [
                    np.ones(3),
                    np.full((2, 2), np.nan),
                    np.full((2, 2), np.inf),
                    -np.ones((2, 2)),
                ],
            },
        },
    ),
    "propose": PublicFunction(
        propose,
        {"observer": OBSERVER, "params": WEIGHTS, "tokens": IDS},
        {
            "observer": WRONG_OBSERVER,
            "params": WRONG_WEIGHTS,
            "tokens": WRONG_PROMPTS,
            "lengths": WRONG_LENGTHS,
        },
    ),
    "state_moments": PublicFunction(
        state_moments,
        {**TEACHER, "tokens": IDS},
        {**WRONG_TEACHER, "tokens": WRONG_PROMPTS, "lengths": WRONG_LENGTHS},
    ),
    "save_observer": PublicFunction(
        save_observer,
        {"folder": "observer", "observer": OBSERVER, "params": WEIGHTS},
        {
            "folder": NO_PLACES,
            "observer": WRONG_OBSERVER,
            "params": WRONG_WEIGHTS,
            "info": {ValueError: [{"loss": NAN}, {"loss": INF}, {"loss": {1, 2}}]},
        },
    ),
    "load_observer": PublicFunction(
        load_observer,
        {"folder": "observer", "teacher_config": CONFIG},
        {"folder": NO_PLACES, "teacher_config": {TypeError: [None, MODEL, {}]}},
    ),
    "observer_info": PublicFunction(
        observer_info, {"folder": "observer"}, {"folder": NO_PLACES}
    ),
}
