"""Misuse of the public functions: one sentence that names the function and the argument.

Nothing here compiles: whatever is wrong is refused before.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pallas_kernels as kernels
import rwkv7_jax as rwkv
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.generation.sampling import make_options
from rwkv7_jax.optim.optimizer import learning_rate_schedule
from rwkv7_jax.training.losses import next_token_loss
from rwkv7_jax.training.projection_statistics import layer_statistics
from rwkv7_jax.tuning.read_statistics import state_statistics
from rwkv7_jax.tuning.state_arithmetic import weighted_sum
from rwkv7_jax.tuning.upscaling import calibrate

CONFIG = rwkv.RWKV7Config(
    vocab_size=257,
    num_layers=2,
    width=32,
    head_size=16,
    implementation="scan",
)
MODEL = rwkv.RWKV7(CONFIG)
WIDER = dataclasses.replace(CONFIG, width=64)
DEEPER = dataclasses.replace(CONFIG, num_layers=3)


def zeros(config: rwkv.RWKV7Config) -> Any:
    """Weights of zeros: what is refused is refused by shapes, and nothing is computed."""
    model = rwkv.RWKV7(config)
    start = rwkv.init_state(config)
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, start)["params"]
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)


PARAMS = zeros(CONFIG)
OTHERS = zeros(WIDER)
DEEP = zeros(DEEPER)
STATE = rwkv.init_state(CONFIG)
THREE = rwkv.init_state(CONFIG, 3)
IDS = np.arange(10, dtype=np.int32).reshape(2, 5)
MASK = np.ones((2, 4), np.float32)
BATCH = {"tokens": IDS, "mask": MASK}
BYTES = rwkv.Tokenizer.bytes()
ADAM = optax.adam(0.1)
LOSS = rwkv.pretrain_loss(MODEL)
STREAM = np.arange(200, dtype=np.int32) % 257
NAN = math.nan
INF = math.inf


class Door(NamedTuple):
    """A public function, arguments that it takes, and values that it must refuse.

    Attributes:
        call: takes all arguments by name.
        right: arguments that are right.
        wrong: by the argument's name, the error's type and values.
    """

    call: Callable[..., Any]
    right: dict[str, Any]
    wrong: dict[str, dict[type, list]]


def apply(config, params, tokens, state, lengths):
    return rwkv.RWKV7(config).apply({"params": params}, tokens, state, lengths)


def wkv7(**arguments):
    shape = (2, 4, 2, 16)
    arrays = {}
    for name in ("r", "log_w", "k", "v", "a", "b"):
        arrays[name] = np.zeros(shape, np.float32)
    arrays["state"] = np.zeros((2, 2, 16, 16), np.float32)
    return kernels.wkv7(**(arrays | arguments))


NO_STATES = [None, {}, "state.pth", [STATE], np.zeros(3)]
NO_MODELS = [None, CONFIG, PARAMS, "model.pth", rwkv.RWKV7]
NO_PARAMS = [None, "model.pth", [PARAMS], STATE]
OTHER_PARAMS = [{}, {"params": PARAMS}, OTHERS, DEEP]
NO_BATCHES = [None, IDS, [BATCH], "poems.jsonl"]
BAD_BATCHES = [
    {},
    {"mask": MASK},
    BATCH | {"mask": np.ones((1, 4))},
    BATCH | {"mask": np.ones((2, 1))},
    BATCH | {"mask": np.ones((2, 5))},
    BATCH | {"mask": np.full((2, 4), NAN)},
    BATCH | {"tokens": IDS[0]},
    BATCH | {"tokens": IDS - 1},
    BATCH | {"tokens": IDS + 250},
    BATCH | {"tokens": IDS[:0], "mask": MASK[:0]},
    BATCH | {"tokens": IDS[:, :1], "mask": MASK[:, :0]},
]
WRONG_KINDS_OF_BATCH = [
    BATCH | {"tokens": IDS * 1.0},
    BATCH | {"tokens": "text"},
    BATCH | {"mask": "all"},
]
NO_NUMBERS = [None, "1", [1.0]]
REMOTE = [
    "https://huggingface.co/BlinkDL/rwkv7-g1/resolve/main/rwkv7-g1-0.4b.pth",
    "hf://BlinkDL/rwkv7-g1",
    "BlinkDL/rwkv7-g1",
    "gs://bucket/model.pth",
    "s3://bucket/model",
]

DOORS = {
    "RWKV7": Door(
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
            "params": {ValueError: [{}, OTHERS, DEEP]},
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
    "RWKV7Config": Door(
        rwkv.RWKV7Config,
        {"vocab_size": 257, "num_layers": 1, "width": 64},
        {
            "vocab_size": {ValueError: [None, 0, -1, 1.5, "257", True]},
            "num_layers": {ValueError: [0, "2"]},
            "head_size": {ValueError: [48, 0]},
            "gate_rank": {ValueError: [-1]},
            "norm_eps": {TypeError: ["small", None], ValueError: [0, NAN, INF, -1.0]},
            "group_norm_eps": {ValueError: [1.0]},
            "dtype": {ValueError: ["float16", None, jnp.float32]},
            "remat": {ValueError: ["all", []]},
            "implementation": {ValueError: ["cuda", 1, ["scan"]]},
        },
    ),
    "RWKV7Config.preset": Door(
        rwkv.RWKV7Config.preset,
        {"name": "0.1b"},
        {"name": {ValueError: ["1b", None, 0.4, []]}},
    ),
    "init_state": Door(
        rwkv.init_state,
        {"config": CONFIG, "batch": 1},
        {
            "config": {TypeError: [None, {}, "0.1b", MODEL, CONFIG.__dict__]},
            "batch": {TypeError: [1.5, "2", None, [1]], ValueError: [-1]},
        },
    ),
    "check_state": Door(
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
    "repeat": Door(
        rwkv.repeat,
        {"state": STATE, "batch": 2},
        {
            "state": {TypeError: NO_STATES, ValueError: [THREE]},
            "batch": {TypeError: [None, 1.0, "2"], ValueError: [-1]},
        },
    ),
    "select": Door(
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
    "stack": Door(
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
    "scaled": Door(
        rwkv.scaled,
        {"state": STATE, "alpha": 0.5},
        {
            "state": {TypeError: NO_STATES},
            "alpha": {TypeError: [None, "1"], ValueError: [NAN, INF, -INF, [1.0, 2.0]]},
        },
    ),
    "weighted_sum": Door(
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
    "generate": Door(
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
            "logits": {TypeError: ["a", {}], ValueError: [[[1.0]], np.zeros(257)]},
            "prefill_chunk": {TypeError: [1.5], ValueError: [0]},
        },
    ),
    "make_options": Door(
        make_options,
        {"vocab_size": 257},
        {"vocab_size": {TypeError: [None, CONFIG], ValueError: [0]}},
    ),
    "prefill_state": Door(
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
    "pretrain_loss": Door(
        rwkv.pretrain_loss,
        {"model": MODEL},
        {
            "model": {TypeError: NO_MODELS},
            "l2wrap": {TypeError: NO_NUMBERS, ValueError: [NAN, -1.0, INF]},
        },
    ),
    "next_token_loss": Door(
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
                ValueError: [*BAD_BATCHES, BATCH | {"mask": 0 * MASK}],
            }
        },
    ),
    "state_loss": Door(
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
    "make_train_step": Door(
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
    "make_eval_step": Door(
        rwkv.make_eval_step, {"loss": LOSS}, {"loss": {TypeError: [None, 1, "loss"]}}
    ),
    "TrainState.create": Door(
        rwkv.TrainState.create,
        {"params": STATE, "tx": ADAM},
        {
            "params": {TypeError: ["state.pth", [LOSS]], ValueError: [{}, None, []]},
            "tx": {TypeError: [None, 0.1, "adam"]},
        },
    ),
    "build_optimizer": Door(
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
    "learning_rate_schedule": Door(
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
    "decorrelate": Door(
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
    "upscale": Door(
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
    "calibrate": Door(
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
    "state_statistics": Door(
        state_statistics,
        {"model": MODEL, "params": PARAMS},
        {
            "model": {TypeError: NO_MODELS},
            "params": {ValueError: OTHER_PARAMS},
            "leaves": {TypeError: ["wkv"], ValueError: [("a",)]},
            "rows": {TypeError: [None], ValueError: [0]},
        },
    ),
    "layer_statistics": Door(
        layer_statistics,
        {"model": MODEL},
        {"model": {TypeError: NO_MODELS}, "rows": {TypeError: ["8"], ValueError: [0]}},
    ),
    "score": Door(
        rwkv.score,
        {
            "model": MODEL,
            "params": PARAMS,
            "state": STATE,
            "batch": BATCH,
            "tokenizer": BYTES,
        },
        {
            "model": {TypeError: NO_MODELS},
            "params": {TypeError: NO_PARAMS, ValueError: OTHER_PARAMS},
            "state": {
                TypeError: NO_STATES,
                ValueError: [THREE, rwkv.init_state(WIDER)],
            },
            "batch": {
                TypeError: NO_BATCHES + WRONG_KINDS_OF_BATCH,
                ValueError: [*BAD_BATCHES, BATCH | {"mask": 0 * MASK}],
            },
            "tokenizer": {TypeError: [None, "bytes", 257]},
        },
    ),
    "load_model": Door(
        rwkv.load_model,
        {"path": "assets/tiny.pth"},
        {"path": {TypeError: [None, 3, ["a"], {}], ValueError: ["", *REMOTE]}},
    ),
    "load_state": Door(
        rwkv.load_state,
        {"path": "poet.pth"},
        {"path": {TypeError: [None, 3, ["a"], {}], ValueError: ["", *REMOTE]}},
    ),
    "save_state": Door(
        rwkv.save_state,
        {"path": "x.pth", "state": STATE},
        {
            "path": {
                TypeError: [None, 3],
                ValueError: ["", "x.bin", "gs://bucket/x.pth"],
            },
            "state": {TypeError: NO_STATES, ValueError: [THREE]},
            "config": {TypeError: [{}, MODEL], ValueError: []},
        },
    ),
    "save_model": Door(
        rwkv.save_model,
        {"path": "x.pth", "params": PARAMS, "config": CONFIG},
        {
            "path": {TypeError: [None, 3], ValueError: ["", "s3://bucket/x.pth"]},
            "params": {TypeError: NO_PARAMS, ValueError: OTHER_PARAMS},
            "config": {TypeError: [None, {}, MODEL]},
        },
    ),
    "Tokenizer.encode": Door(
        BYTES.encode, {"text": "a"}, {"text": {TypeError: [None, 3, [1]]}}
    ),
    "Tokenizer.decode": Door(
        BYTES.decode,
        {"ids": [1]},
        {
            "ids": {
                TypeError: [None, 3, "text", [0.5], [None]],
                ValueError: [[300], [-1]],
            }
        },
    ),
    "Tokenizer.token_bytes": Door(
        BYTES.token_bytes,
        {"token": 1},
        {"token": {TypeError: [None, "a", 1.5], ValueError: [-1, 257]}},
    ),
    "Tokenizer.for_vocabulary": Door(
        rwkv.Tokenizer.for_vocabulary,
        {"vocab_size": 257},
        {"vocab_size": {TypeError: [None, "257", CONFIG], ValueError: [0, 1000]}},
    ),
    "packed": Door(
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
    "token_stream": Door(
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
    "wkv7": Door(
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

ROWS = []
for function, door in DOORS.items():
    for argument, kinds in door.wrong.items():
        for error, values in kinds.items():
            ROWS.extend((function, argument, error, value) for value in values)


def name_of_row(value: Any) -> str | None:
    """Names rows by function, argument and error; values have no short names."""
    return (
        value
        if isinstance(value, str) and len(value) < 30
        else getattr(value, "__name__", "")
    )


@pytest.mark.parametrize(
    ("function", "argument", "error", "value"), ROWS, ids=name_of_row
)
def test_a_misuse_is_one_sentence_that_names_function_and_argument(
    unchecked, function, argument, error, value
):
    door = DOORS[function]
    with pytest.raises(error) as caught:
        door.call(**(door.right | {argument: value}))
    message = str(caught.value)
    assert message.startswith(f"{function}: ")
    # A field of the argument counts: `batch.mask`, `states[1]`.
    assert f"`{argument}" in message
    assert "\n" not in message


def test_the_table_holds_every_public_name_and_enough_rows():
    assert len(ROWS) >= 200
    covered = {function.partition(".")[0] for function in DOORS}
    modules_and_results = {"data", "RWKV7State"}
    assert set(rwkv.__all__) - covered == modules_and_results
    # Every function in the table takes what is right, where that needs no compiling.
    for function in (
        "init_state",
        "repeat",
        "select",
        "stack",
        "build_optimizer",
        "packed",
    ):
        door = DOORS[function]
        assert door.call(**door.right) is not None


@pytest.mark.parametrize("batch", BAD_BATCHES)
def test_a_step_refuses_a_batch_before_it_compiles(unchecked, batch):
    train = rwkv.TrainState.create(PARAMS, ADAM)
    step = rwkv.make_train_step(LOSS, ADAM)
    evaluate = rwkv.make_eval_step(LOSS)
    for call in (lambda: step(train, batch), lambda: evaluate(PARAMS, batch)):
        with pytest.raises(ValueError, match=r"^\w+: `batch"):
            call()


@pytest.mark.parametrize("load", [rwkv.load_model, rwkv.load_state])
@pytest.mark.parametrize("path", REMOTE)
def test_a_place_elsewhere_is_named_with_the_command_that_downloads_it(load, path):
    with pytest.raises(
        ValueError, match=r"ownload it first.* `(curl|hf|gcloud|aws) "
    ) as caught:
        load(path)
    assert path in str(caught.value)


def test_values_from_everywhere_pass():
    for alpha in itertools.chain(
        (0, 1.0), (np.float32(0.5), jnp.float32(2), np.array(1.0))
    ):
        assert rwkv.scaled(STATE, alpha).batch == 1
    for rows in (
        0,
        np.int64(1),
        [0, 2],
        (1,),
        range(2),
        np.array([True, False, True]),
        slice(2),
    ):
        assert rwkv.select(THREE, rows).batch >= 1
