"""Training and tuning: arguments that are right, and values that must be refused."""

import numpy as np
import optax
from misuse_values import (
    ADAM,
    BAD_BATCHES,
    BATCH,
    CONFIG,
    IDS,
    INF,
    MODEL,
    NAN,
    NO_BATCHES,
    NO_MODELS,
    NO_NUMBERS,
    NO_PARAMS,
    NO_STATES,
    NOTHING_COUNTS,
    OTHER_PARAMS,
    PARAMS,
    STATE,
    WRONG_KINDS_OF_BATCH,
    WRONG_MODEL,
    WRONG_PARAMS,
    PublicFunction,
    count,
)

import rwkv7_jax as rwkv
from rwkv7_jax.model.kernel_features import Features
from rwkv7_jax.optim.optimizer import learning_rate_schedule
from rwkv7_jax.training.losses import next_token_loss
from rwkv7_jax.training.projection_statistics import (
    layer_statistics,
    weight_decorrelator,
)
from rwkv7_jax.tuning.calibration import calibrate
from rwkv7_jax.tuning.read_statistics import state_decorrelator, state_statistics
from rwkv7_jax.tuning.state_tuning import trainable_mask
from rwkv7_jax.tuning.upscaling import empty_memory, stability_ratio

FEATURES = Features(
    landmarks=np.ones((2, 1, 2, 4, 16), np.float32),
    widths=np.ones((2, 1, 2, 4), np.float32),
    mean=np.zeros((2, 1, 2, 4), np.float32),
    map=None,
    kind="gaussian",
)

LOSS = rwkv.pretrain_loss(MODEL)

FUNCTIONS = {
    "pretrain_loss": PublicFunction(
        rwkv.pretrain_loss,
        {"model": MODEL},
        {
            "model": {TypeError: NO_MODELS},
            "l2wrap": {TypeError: NO_NUMBERS, ValueError: [NAN, -1.0, INF]},
        },
    ),
    "next_token_loss": PublicFunction(
        next_token_loss,
        {
            "model": MODEL,
            "params": PARAMS,
            "state": rwkv.init_state(CONFIG, 2),
            "batch": BATCH,
        },
        {
            "batch": {
                TypeError: NO_BATCHES + WRONG_KINDS_OF_BATCH,
                ValueError: [*BAD_BATCHES, NOTHING_COUNTS],
            }
        },
    ),
    "state_loss": PublicFunction(
        rwkv.state_loss,
        {"model": MODEL, "params": PARAMS},
        {
            "model": {TypeError: NO_MODELS},
            "params": {TypeError: NO_PARAMS, ValueError: OTHER_PARAMS},
            "leaves": {TypeError: ["wkv", None, 3], ValueError: [(), ("w",), (None,)]},
            "anchor": {TypeError: NO_NUMBERS, ValueError: [NAN, -1.0]},
            "l2wrap": {TypeError: NO_NUMBERS, ValueError: [INF, -1.0]},
        },
    ),
    "make_train_step": PublicFunction(
        rwkv.make_train_step,
        {"loss": LOSS, "tx": ADAM},
        {
            "loss": {TypeError: [None, MODEL.config, "loss", 1.0]},
            "tx": {TypeError: [None, 0.1, "adam", optax.GradientTransformation]},
            "statistics": {TypeError: [1, "dbp"]},
            "accumulate": {TypeError: [None, 1.5], ValueError: [0, -1]},
            "mesh": {TypeError: ["data", 2]},
        },
    ),
    "make_eval_step": PublicFunction(
        rwkv.make_eval_step, {"loss": LOSS}, {"loss": {TypeError: [None, 1, "loss"]}}
    ),
    "TrainState.create": PublicFunction(
        rwkv.TrainState.create,
        {"params": STATE, "tx": ADAM},
        {
            "params": {TypeError: ["state.pth", [LOSS]], ValueError: [{}, None, []]},
            "tx": {TypeError: [None, 0.1, "adam"]},
        },
    ),
    "build_optimizer": PublicFunction(
        rwkv.build_optimizer,
        {"learning_rate": 0.1},
        {
            "learning_rate": {TypeError: NO_NUMBERS, ValueError: [NAN, INF, -1.0]},
            "kind": {ValueError: ["adam", None, 1]},
            "weight_decay": {TypeError: NO_NUMBERS, ValueError: [NAN, -1.0]},
            "clip": {TypeError: ["1"], ValueError: [0, NAN, -1.0, INF]},
            "b1": {TypeError: NO_NUMBERS, ValueError: [1.0, -0.1, NAN, 2]},
            "b2": {TypeError: NO_NUMBERS, ValueError: [1.0, -0.1, NAN]},
            "eps": {TypeError: NO_NUMBERS, ValueError: [NAN, -1.0]},
        },
    ),
    "learning_rate_schedule": PublicFunction(
        learning_rate_schedule,
        {
            "kind": "cosine",
            "peak": 1.0,
            "final": 0.1,
            "warmup_steps": 1,
            "total_steps": 9,
        },
        {
            "kind": {ValueError: ["step", None]},
            "peak": {TypeError: NO_NUMBERS, ValueError: [NAN, -1.0]},
            "final": {ValueError: [INF]},
            "warmup_steps": {TypeError: [0.5], ValueError: [-1]},
            "total_steps": {TypeError: [None], ValueError: [-1]},
        },
    ),
    "decorrelate": PublicFunction(
        rwkv.decorrelate,
        {"inner": ADAM},
        {
            "inner": {TypeError: [None, 0.1, "adam"]},
            "mode": {ValueError: ["dbp", None]},
            "rate": {TypeError: NO_NUMBERS, ValueError: [NAN, -1, INF]},
            "balance": {TypeError: ["a"], ValueError: [2, NAN]},
            "iterations": {TypeError: ["a"], ValueError: [-1, 1.5]},
            "damping": {TypeError: ["a"], ValueError: [NAN, -1]},
            "average": {TypeError: ["a"], ValueError: [2]},
            "clip": {TypeError: ["a"], ValueError: [0, NAN, INF]},
            "every": {TypeError: ["a"], ValueError: [0]},
        },
    ),
    "upscale": PublicFunction(
        rwkv.upscale,
        {"model": MODEL, "params": PARAMS, "tokens": IDS},
        {
            "model": {TypeError: NO_MODELS},
            "params": {TypeError: NO_PARAMS, ValueError: OTHER_PARAMS},
            "tokens": {
                TypeError: [None, "text", IDS * 1.0],
                ValueError: [IDS[0], IDS[:0], IDS - 1, IDS + 250],
            },
            "size": {TypeError: [None, 1.5], ValueError: [-1]},
            "dynamics": {ValueError: ["fast", None]},
            "kind": {ValueError: ["relu"]},
            "landmarks": {ValueError: ["grid", None]},
            "widths": {
                TypeError: [1.0, "a"],
                ValueError: [(0.0,), (NAN,), (1.0, -1.0)],
            },
            "prepare": {ValueError: ["scale"]},
            "seed": {TypeError: [None, 0.5], ValueError: [-1, 2**40]},
        },
    ),
    "empty_memory": PublicFunction(
        empty_memory,
        {"features": FEATURES},
        {
            "features": {TypeError: [None, {}, STATE]},
            "dynamics": {ValueError: ["fast", None]},
            "seed": {TypeError: [None, 0.5], ValueError: [-1, 2**40]},
        },
    ),
    "stability_ratio": PublicFunction(
        stability_ratio,
        {"upscaled": None, "parts": {}},
        # A static memory, which no step changes.
        {"upscaled": {TypeError: [empty_memory(FEATURES)]}},
    ),
    "calibrate": PublicFunction(
        calibrate,
        {"reads": np.ones((2, 9, 2, 16)), "size": 4},
        {
            "reads": {
                TypeError: [None, "a"],
                ValueError: [np.ones(3), np.full((1, 2, 1, 4), NAN)],
            },
            "size": {TypeError: [None], ValueError: [0]},
            "damping": {TypeError: ["a"], ValueError: [NAN, -1]},
        },
    ),
    "state_statistics": PublicFunction(
        state_statistics,
        {"model": MODEL, "params": PARAMS},
        {
            "model": {TypeError: NO_MODELS},
            "params": {ValueError: OTHER_PARAMS},
            "leaves": {TypeError: ["wkv"], ValueError: [("a",)]},
            "rows": {TypeError: [None], ValueError: [0]},
        },
    ),
    "layer_statistics": PublicFunction(
        layer_statistics,
        {"model": MODEL},
        {"model": {TypeError: NO_MODELS}, "rows": {TypeError: ["8"], ValueError: [0]}},
    ),
    "trainable_mask": PublicFunction(
        trainable_mask,
        {"state": STATE, "leaves": ("wkv",)},
        {
            "state": {TypeError: NO_STATES},
            "leaves": {
                TypeError: ["wkv", None],
                ValueError: [(), ("w",), ("memory",)],
            },
        },
    ),
    "state_decorrelator": PublicFunction(
        state_decorrelator,
        {"model": MODEL, "params": PARAMS, "start": STATE},
        {
            "model": WRONG_MODEL,
            "params": WRONG_PARAMS,
            "start": {TypeError: NO_STATES},
            "leaves": {TypeError: ["wkv"], ValueError: [("a",)]},
            "method": {ValueError: ["online", None]},
            "rows": count(1),
        },
    ),
    "weight_decorrelator": PublicFunction(
        weight_decorrelator,
        {"model": MODEL},
        {"method": {ValueError: ["online", None]}, "rows": count(1)},
    ),
}
