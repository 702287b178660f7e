"""The model and states: arguments that are right, and values that must be refused."""

import jax.numpy as jnp
import numpy as np
from misuse_values import (
    CONFIG,
    DEEPER,
    IDS,
    INF,
    MODEL,
    NAN,
    NO_STATES,
    PARAMS,
    STATE,
    THREE,
    WIDER,
    WRONG_PARAMS,
    PublicFunction,
)

import pallas_kernels as kernels
import rwkv7_jax as rwkv
from rwkv7_jax.tuning.state_arithmetic import weighted_sum


def apply(config, params, tokens, state, lengths):
    return rwkv.RWKV7(config).apply({"params": params}, tokens, state, lengths)


def apply_to(variables):
    return MODEL.apply(variables, IDS, rwkv.init_state(CONFIG, 2))


def wkv7(**arguments):
    shape = (2, 4, 2, 16)
    arrays = {}
    for name in ("r", "log_w", "k", "v", "a", "b"):
        arrays[name] = np.zeros(shape, np.float32)
    arrays["state"] = np.zeros((2, 2, 16, 16), np.float32)
    return kernels.wkv7(**(arrays | arguments))


FUNCTIONS = {
    "RWKV7": PublicFunction(
        apply,
        {
            "config": CONFIG,
            "params": PARAMS,
            "tokens": IDS,
            "state": rwkv.init_state(CONFIG, 2),
            "lengths": None,
        },
        {
            "config": {TypeError: [None, {}, "0.1b", MODEL]},
            "params": WRONG_PARAMS,
            "tokens": {
                TypeError: [None, "text", IDS * 1.0, {}, [["a"]], IDS > 1],
                ValueError: [IDS - 1, IDS + 250, IDS[0], IDS[None], [[1], [2, 3]]],
            },
            "state": {
                TypeError: NO_STATES,
                ValueError: [STATE, THREE, rwkv.init_state(WIDER, 2)],
            },
            "lengths": {
                TypeError: ["2", [1.0, 2.0], {}],
                ValueError: [[1], [-1, 2], [2, 6], np.array([[1, 2]])],
            },
        },
    ),
    # Without a word of ours, Flax would speak of scopes.
    "RWKV7 of variables": PublicFunction(
        apply_to,
        {"variables": {"params": PARAMS}},
        {
            "variables": {
                TypeError: [None, [PARAMS], "model.pth", STATE],
                ValueError: [{}, PARAMS, {"weights": PARAMS}],
            },
        },
    ),
    "RWKV7Config": PublicFunction(
        rwkv.RWKV7Config,
        {"vocab_size": 257, "num_layers": 1, "width": 64},
        {
            "vocab_size": {ValueError: [None, 0, -1, 1.5, "257", True]},
            "num_layers": {ValueError: [0, "2"]},
            "head_size": {ValueError: [48, 0]},
            "gate_rank": {ValueError: [-1]},
            "norm_eps": {TypeError: ["small", None], ValueError: [0, NAN, INF, -1.0]},
            "group_norm_eps": {ValueError: [1.0]},
            "dtype": {ValueError: ["float16", None, jnp.float16]},
            "remat": {ValueError: ["all", []]},
            "implementation": {ValueError: ["cuda", 1, ["scan"]]},
        },
    ),
    "RWKV7Config.preset": PublicFunction(
        rwkv.RWKV7Config.preset,
        {"name": "0.1b"},
        {"name": {ValueError: ["1b", None, 0.4, []]}},
    ),
    "init_state": PublicFunction(
        rwkv.init_state,
        {"config": CONFIG, "batch": 1},
        {
            "config": {TypeError: [None, {}, "0.1b", MODEL, CONFIG.__dict__]},
            "batch": {TypeError: [1.5, "2", None, [1]], ValueError: [-1]},
        },
    ),
    "check_state": PublicFunction(
        rwkv.check_state,
        {"state": STATE, "batch": 1, "config": CONFIG},
        {
            "state": {
                TypeError: [
                    *NO_STATES,
                    STATE.replace(wkv=None),
                    STATE.replace(wkv=[1]),
                ],
                ValueError: [THREE, STATE.replace(wkv=np.zeros(3, np.float32))],
            },
            "batch": {TypeError: [None, "1"], ValueError: [-1]},
            "config": {TypeError: [None, {}, MODEL]},
        },
    ),
    "repeat": PublicFunction(
        rwkv.repeat,
        {"state": STATE, "batch": 2},
        {
            "state": {TypeError: NO_STATES, ValueError: [THREE]},
            "batch": {TypeError: [None, 1.0, "2"], ValueError: [-1]},
        },
    ),
    "select": PublicFunction(
        rwkv.select,
        {"state": THREE, "rows": 0},
        {
            "state": {TypeError: NO_STATES},
            "rows": {
                TypeError: [None, "0", 1.0, [0.5], {}, slice("a", None), ["a"]],
                ValueError: [
                    3,
                    -4,
                    [0, 3],
                    [[0]],
                    np.array([5]),
                    [True],
                    [[0], [1, 2]],
                ],
            },
        },
    ),
    "stack": PublicFunction(
        rwkv.stack,
        {"states": [STATE]},
        {
            "states": {
                TypeError: [None, STATE, "a.pth", [None], [STATE, {}], 3],
                ValueError: [
                    [],
                    [STATE, rwkv.init_state(WIDER)],
                    [STATE, rwkv.init_state(DEEPER)],
                ],
            }
        },
    ),
    "scaled": PublicFunction(
        rwkv.scaled,
        {"state": STATE, "alpha": 0.5},
        {
            "state": {TypeError: NO_STATES},
            "alpha": {TypeError: [None, "1"], ValueError: [NAN, INF, -INF, [1.0, 2.0]]},
        },
    ),
    "weighted_sum": PublicFunction(
        weighted_sum,
        {"states": [STATE, STATE], "weights": [0.5, 0.5]},
        {
            "states": {TypeError: [None, STATE, [STATE, None]]},
            "weights": {
                TypeError: [None, 1.0, "ab"],
                ValueError: [[1.0], [NAN, 1.0], [INF, 0]],
            },
        },
    ),
    "wkv7": PublicFunction(
        wkv7,
        {},
        {
            "r": {
                TypeError: [None, "r"],
                ValueError: [np.zeros((4, 2, 16), np.float32)],
            },
            "k": {
                TypeError: [np.zeros((2, 4, 2, 16), np.int32)],
                ValueError: [np.zeros(3)],
            },
            "state": {
                TypeError: [None, STATE, np.zeros((2, 2, 16, 16), np.float16)],
                ValueError: [np.zeros((1, 2, 16, 16), np.float32)],
            },
            "implementation": {ValueError: ["cuda", 1]},
            "chunk": {ValueError: [8, 16.5, "16"]},
            "lengths": {
                TypeError: ["a"],
                ValueError: [[1], [-1, 2], [2, 5], [0.5, 1.0], np.array([[1, 2]])],
            },
        },
    ),
}
