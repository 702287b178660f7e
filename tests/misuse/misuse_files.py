"""Files and data: arguments that are right, and values that must be refused."""

import numpy as np
from misuse_values import (
    BAD_BATCHES,
    BATCH,
    BYTES,
    CONFIG,
    MODEL,
    NAN,
    NO_BATCHES,
    NO_PARAMS,
    NO_STATES,
    OTHER_PARAMS,
    PARAMS,
    REMOTE,
    STATE,
    THREE,
    PublicFunction,
    count,
)

import rwkv7_jax as rwkv
from rwkv7_jax.data.batching import batch_at, windows

STREAM = np.arange(200, dtype=np.int32) % 257

FUNCTIONS = {
    "load_model": PublicFunction(
        rwkv.load_model,
        {"path": "assets/tiny.pth"},
        {"path": {TypeError: [None, 3, ["a"], {}], ValueError: ["", *REMOTE]}},
    ),
    "load_state": PublicFunction(
        rwkv.load_state,
        {"path": "poet.pth"},
        {"path": {TypeError: [None, 3, ["a"], {}], ValueError: ["", *REMOTE]}},
    ),
    "save_state": PublicFunction(
        rwkv.save_state,
        {"path": "x.pth", "state": STATE},
        {
            "path": {
                TypeError: [None, 3],
                ValueError: ["", "x.bin", "gs://bucket/x.pth"],
            },
            "state": {TypeError: NO_STATES, ValueError: [THREE]},
            "config": {TypeError: [{}, MODEL], ValueError: []},
            "logits": {
                TypeError: ["x", 3, {}],
                ValueError: [[], np.zeros((2, 5)), np.full(5, np.nan)],
            },
        },
    ),
    "save_model": PublicFunction(
        rwkv.save_model,
        {"path": "x.pth", "params": PARAMS, "config": CONFIG},
        {
            "path": {TypeError: [None, 3], ValueError: ["", "s3://bucket/x.pth"]},
            "params": {TypeError: NO_PARAMS, ValueError: OTHER_PARAMS},
            "config": {TypeError: [None, {}, MODEL]},
        },
    ),
    "packed": PublicFunction(
        rwkv.data.packed,
        {"source": STREAM, "batch_size": 2, "length": 8, "tokenizer": BYTES},
        {
            "source": {TypeError: [None, 3, {}], ValueError: [[]]},
            "batch_size": {TypeError: [None, 1.5, "4"], ValueError: [0, -1]},
            "length": {TypeError: [None, 1.5], ValueError: [0, -1]},
            "seed": {TypeError: [None, 0.5], ValueError: [-1]},
            "start_step": {TypeError: [None, 0.5], ValueError: [-1]},
            "split": {ValueError: ["test", None]},
            "held_out": {TypeError: [None, "a"], ValueError: [-0.1, 1.5, NAN]},
            "order": {ValueError: ["random", None]},
            "packing": {ValueError: ["rows", None]},
            "tokenizer": {TypeError: ["world", 257]},
            "rows": {TypeError: [2, [0]]},
        },
    ),
    "token_stream": PublicFunction(
        rwkv.data.token_stream,
        {"source": STREAM, "tokenizer": BYTES},
        {
            "source": {
                TypeError: [None, 3, STREAM * 1.0],
                ValueError: [[], STREAM + 100],
            },
            "tokenizer": {TypeError: [None, "world"]},
            "split": {ValueError: ["test"]},
            "held_out": {TypeError: ["a"], ValueError: [NAN, 2.0]},
            "on_bad": {ValueError: ["ignore"]},
        },
    ),
    "packed of a short text": PublicFunction(
        rwkv.data.packed,
        {"source": STREAM[:31], "batch_size": 2, "length": 8, "tokenizer": BYTES},
        {
            "length": {ValueError: [16, 31, 1000]},
            "source": {ValueError: [STREAM[:15], STREAM[None], STREAM[:1]]},
        },
    ),
    "packed of short documents": PublicFunction(
        rwkv.data.packed,
        {
            "source": STREAM,
            "batch_size": 2,
            "length": 8,
            "tokenizer": BYTES,
            "packing": "documents",
        },
        {"source": {ValueError: [STREAM * 0]}},
    ),
    "packed of the cubic order": PublicFunction(
        rwkv.data.packed,
        {
            "source": STREAM,
            "batch_size": 2,
            "length": 8,
            "tokenizer": BYTES,
            "order": "cubic",
        },
        {"source": {ValueError: [STREAM[:23]]}, "length": {ValueError: [67]}},
    ),
    "batch_at": PublicFunction(
        batch_at,
        {"stream": STREAM, "step": 0, "batch_size": 2, "length": 8},
        {
            "stream": {ValueError: [STREAM[:15]]},
            "step": count(0),
            "batch_size": count(1),
            "length": count(1),
            "seed": count(0),
            "order": {ValueError: ["random", None]},
            "packing": {ValueError: ["rows", None]},
            "rows": {TypeError: [2, [0]]},
        },
    ),
    "windows": PublicFunction(
        windows,
        {"stream": STREAM, "length": 8, "count": 2},
        {
            "stream": {ValueError: [STREAM[:8]]},
            "length": count(1),
            "count": count(1),
            "packing": {ValueError: ["rows", None]},
        },
    ),
    "Batch.of": PublicFunction(
        rwkv.data.Batch.of,
        {"batch": BATCH},
        {"batch": {TypeError: NO_BATCHES, ValueError: BAD_BATCHES[:5]}},
    ),
}
