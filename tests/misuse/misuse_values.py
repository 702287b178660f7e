"""The public functions' table of misuses: what a row is, and values that many rows share."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rwkv7_jax as rwkv


class PublicFunction(NamedTuple):
    """A public function, arguments that it takes, and values that it must refuse.

    Attributes:
        call: takes all arguments by name.
        right: arguments that are right.
        wrong: by the argument's name, the error's type and values.
    """

    call: Callable[..., Any]
    right: dict[str, Any]
    wrong: dict[str, dict[type, list]]


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
KEY = jax.random.key(0)
NAN = math.nan
INF = math.inf

NO_STATES = [None, {}, "state.pth", [STATE], np.zeros(3)]
OTHER_STATES = [THREE, rwkv.init_state(WIDER), rwkv.init_state(DEEPER)]
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
    BATCH | {"mask": -MASK},
    BATCH | {"tokens": IDS[0]},
    BATCH | {"tokens": IDS - 1},
    BATCH | {"tokens": IDS + 250},
    BATCH | {"tokens": IDS[:0], "mask": MASK[:0]},
    BATCH | {"tokens": IDS[:, :1], "mask": MASK[:, :0]},
    BATCH | {"anchor": IDS[:, :1]},
]
NOTHING_COUNTS = BATCH | {"mask": 0 * MASK}
WRONG_KINDS_OF_BATCH = [
    BATCH | {"tokens": IDS * 1.0},
    BATCH | {"tokens": "text"},
    BATCH | {"mask": "all"},
]
# By the error's type, for readers of a mask.
WRONG_BATCHES = {
    TypeError: NO_BATCHES + WRONG_KINDS_OF_BATCH,
    ValueError: [*BAD_BATCHES, NOTHING_COUNTS],
}
NO_NUMBERS = [None, "1", [1.0]]
NO_PLACES = {TypeError: [None, 3, ["a"]], ValueError: ["", "gs://bucket/x"]}
REMOTE = [
    "https://huggingface.co/BlinkDL/rwkv7-g1/resolve/main/rwkv7-g1-0.4b.pth",
    "hf://BlinkDL/rwkv7-g1",
    "BlinkDL/rwkv7-g1",
    "gs://bucket/model.pth",
    "s3://bucket/model",
]


def count(least: int, *more: Any) -> dict[type, list]:
    """Makes the values that are no count of at least `least`."""
    return {TypeError: [None, 1.5, "2"], ValueError: [least - 1, *more]}


def number(*more: float) -> dict[type, list]:
    """Makes the values that are no finite number of at least 0."""
    return {TypeError: NO_NUMBERS, ValueError: [NAN, INF, -1.0, *more]}


NO_FUNCTIONS = {TypeError: [None, 1, "function"]}
NO_KEYS = {TypeError: [None, 1, "key"], ValueError: [jax.random.split(KEY)]}
WRONG_MODEL = {TypeError: NO_MODELS}
WRONG_PARAMS = {TypeError: NO_PARAMS, ValueError: OTHER_PARAMS}
WRONG_STATE = {TypeError: NO_STATES, ValueError: OTHER_STATES}
