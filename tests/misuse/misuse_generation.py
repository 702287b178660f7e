"""Generation and text: arguments that are right, and values that must be refused."""

import numpy as np
from misuse_values import (
    BYTES,
    CONFIG,
    INF,
    MODEL,
    NAN,
    NO_MODELS,
    NO_NUMBERS,
    NO_PARAMS,
    OTHER_PARAMS,
    PARAMS,
    STATE,
    THREE,
    PublicFunction,
)

import rwkv7_jax as rwkv
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.generation.sampling import make_options

FUNCTIONS = {
    "generate": PublicFunction(
        rwkv.generate,
        {"model": MODEL, "params": PARAMS, "prompts": [1], "temperature": 0},
        {
            "model": {TypeError: NO_MODELS},
            "params": {TypeError: NO_PARAMS, ValueError: OTHER_PARAMS},
            "prompts": {
                TypeError: [
                    None,
                    "text",
                    b"text",
                    3,
                    {},
                    [1.5],
                    [[1.5]],
                    ["a"],
                    [["a"]],
                    {1, 2},
                ],
                ValueError: [[], [[1], []], [257], [-1], [[[1]]], np.array(3)],
            },
            "state": {TypeError: ["a.pth", {}, [STATE]], ValueError: [THREE]},
            "tokens": {TypeError: [None, 1.5, "9"], ValueError: [-1]},
            "key": {TypeError: [1, "key"]},
            "temperature": {TypeError: NO_NUMBERS, ValueError: [-0.1, NAN, INF]},
            "top_p": {TypeError: NO_NUMBERS, ValueError: [-0.1, 1.1, NAN]},
            "top_k": {TypeError: [None, 0.5, "9"], ValueError: [-1]},
            "presence_penalty": {TypeError: NO_NUMBERS, ValueError: [NAN, INF]},
            "frequency_penalty": {TypeError: NO_NUMBERS, ValueError: [NAN, -INF]},
            "penalty_decay": {TypeError: NO_NUMBERS, ValueError: [-1, 2, NAN]},
            "penalty_exempt": {
                TypeError: [None, 0, "a", [0.5]],
                ValueError: [[257], [-1]],
            },
            "banned": {
                TypeError: [None, 1, ["a"]],
                ValueError: [[300], range(257), [[1]]],
            },
            "stop_ids": {
                TypeError: [None, 0, "0", {}],
                ValueError: [[-1], [257], [[0]]],
            },
            "stop_strings": {TypeError: ["x", [1], None]},
            "tokenizer": {TypeError: ["world"]},
            "on_text": {TypeError: ["print"]},
            "should_stop": {TypeError: [True]},
            "logits": {TypeError: ["a", {}], ValueError: [[[1.0]], np.zeros(257)]},
            "prefill_chunk": {TypeError: [1.5], ValueError: [0]},
        },
    ),
    "make_options": PublicFunction(
        make_options,
        {"vocab_size": 257},
        {"vocab_size": {TypeError: [None, CONFIG], ValueError: [0]}},
    ),
    "prefill_state": PublicFunction(
        prefill_state,
        {"model": MODEL, "params": PARAMS, "tokens": [1, 2]},
        {
            "model": {TypeError: NO_MODELS},
            "params": {TypeError: NO_PARAMS, ValueError: OTHER_PARAMS},
            "tokens": {
                TypeError: [None, "text", [0.5]],
                ValueError: [[-1], [257], [[1]]],
            },
            "chunk": {TypeError: [None], ValueError: [0]},
        },
    ),
    "Tokenizer.encode": PublicFunction(
        BYTES.encode, {"text": "a"}, {"text": {TypeError: [None, 3, [1]]}}
    ),
    "Tokenizer.decode": PublicFunction(
        BYTES.decode,
        {"ids": [1]},
        {
            "ids": {
                TypeError: [None, 3, "text", [0.5], [None]],
                ValueError: [[300], [-1]],
            }
        },
    ),
    "Tokenizer.token_bytes": PublicFunction(
        BYTES.token_bytes,
        {"token": 1},
        {"token": {TypeError: [None, "a", 1.5], ValueError: [-1, 257]}},
    ),
    "Tokenizer.for_vocabulary": PublicFunction(
        rwkv.Tokenizer.for_vocabulary,
        {"vocab_size": 257},
        {"vocab_size": {TypeError: [None, "257", CONFIG], ValueError: [0, 1000]}},
    ),
}
