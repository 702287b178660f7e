"""Multi-query associative recall: its rows, the models that are compared on it, and their trainer.

A row shows pairs of a key and a value and then asks for each key once, between random tokens. The
value is the label at the key's place and is not fed back. `benchmarks.recall` makes the table.

Source: the protocol of Arora et al. 2024 (arXiv 2402.18668), as HazyResearch/zoology generates it
in zoology/data/multiquery_ar.py.
"""

import abc
import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.random import Generator

import rwkv7_jax as rwkv
from rwkv7_jax.based import (
    Based,
    BasedConfig,
    StateBytes,
    init_based_state,
    state_bytes,
)
from rwkv7_jax.model import Features
from rwkv7_jax.tuning.upscaling import empty_memory

# Streams of random rows: of training, of the choice of a rate and an end, and of the table.
TRAIN = 7
VALIDATION = 98
TEST = 99

# Rows that are tested at once.
TEST_BATCH = 64

# The width of the kernel of an upscaled memory's features; 2 learns later.
KERNEL_WIDTH = 0.5


@dataclasses.dataclass(frozen=True)
class Size:
    """Rows of so many tokens and pairs, and their share among the rows of training."""

    tokens: int
    pairs: int
    share: float = 1.0

    def __str__(self) -> str:
        """Names the size as in the table's columns."""
        return f"{self.pairs} of {self.tokens}"


@dataclasses.dataclass(frozen=True)
class Setting:
    """The sizes and the recipe that all models of a table share.

    Attributes:
        vocab_size: half of it keys, half values.
        width: of the models (D).
        rows: of a training batch.
        steps: of a run, unless it ends earlier.
        train: sizes of training rows, from easy to hard.
        tests: sizes of the table's columns.
        rates: peak learning rates that are tried.
        unlock: share of a run after which the next size joins; 0 starts with all of them.
        solved: share right on the hardest size of training; twice running, it ends a run.
        test_rows: of each size.
    """

    vocab_size: int
    width: int
    rows: int
    steps: int
    train: tuple[Size, ...]
    tests: tuple[Size, ...]
    rates: tuple[float, ...]
    unlock: float
    solved: float
    test_rows: int


# The smallest setting in which models differ.
SMALL = Setting(
    vocab_size=128,
    width=32,
    rows=32,
    steps=1500,
    train=(Size(64, 4), Size(64, 8), Size(64, 16)),
    # The last one is twice as long as anything in training.
    tests=(Size(64, 4), Size(64, 8), Size(64, 16), Size(128, 32)),
    rates=(0.003, 0.01, 0.03),
    unlock=0.1,
    solved=0.999,
    test_rows=256,
)

# The published sizes, for a GPU; 8 of the 32 published epochs of 180,000 rows.
FULL = Setting(
    vocab_size=8192,
    width=64,
    rows=256,
    steps=8 * 180_000 // 256,
    train=(
        Size(64, 4, 0.56),
        Size(128, 8, 0.11),
        Size(256, 16, 0.11),
        Size(256, 32, 0.11),
        Size(256, 64, 0.11),
    ),
    tests=(
        Size(64, 4),
        Size(64, 8),
        Size(64, 16),
        Size(128, 32),
        Size(256, 64),
        Size(512, 128),
        Size(1024, 256),
    ),
    rates=(1e-3, 3.2e-3, 1e-2, 3.2e-2),
    unlock=0.0,
    solved=0.99,
    test_rows=1024,
)

# How fast the asked places thin out: the g-th is drawn with probability ~ g^(POWER - 1).
POWER = 0.01


def rows(
    rng: Generator, count: int, size: Size, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Makes rows and their labels, both [B T] int32; labels are -1 where nothing is asked.

    Keys are 1 to V / 2 - 1 and values V / 2 to V - 1, none twice in a row. Random tokens fill the
    places that ask nothing. Such a token may be a key, and what follows it looks like its value.
    """
    half = vocab_size // 2
    shown = 2 * size.pairs
    slots = (size.tokens - shown) // 2
    keys = 1 + _distinct(rng, count, size.pairs, half - 1)
    values = half + _distinct(rng, count, size.pairs, half)
    x = rng.integers(0, vocab_size, (count, size.tokens))
    x[:, 0:shown:2] = keys
    x[:, 1:shown:2] = values
    # Draws without replacement are the largest of log p + Gumbel noise.
    log_p = (POWER - 1) * np.log(np.arange(1, slots + 1))
    score = log_p + rng.gumbel(size=(count, slots))
    chosen = np.argsort(-score, axis=1)[:, : size.pairs]
    # In an order of their own: by score, the pairs shown first would be asked first.
    order = _distinct(rng, count, size.pairs, size.pairs)
    places = shown + 2 * np.take_along_axis(chosen, order, axis=1)
    y = np.full((count, size.tokens), -1)
    np.put_along_axis(x, places, keys, axis=1)
    np.put_along_axis(y, places, values, axis=1)
    return x.astype(np.int32), y.astype(np.int32)


def _distinct(rng: Generator, count: int, size: int, below: int) -> np.ndarray:
    """Draws `size` different numbers below `below` in each of `count` rows."""
    return np.argsort(rng.random((count, below)), axis=1)[:, :size]


class Contestant(abc.ABC):
    """A model of the table: parameters, a start state, a call, and what its state weighs."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Any:
        """Draws the parameters that are trained."""

    @abc.abstractmethod
    def start(self, params: Any, batch: int) -> Any:
        """Makes the state of rows that have read nothing."""

    @abc.abstractmethod
    def run(self, params: Any, x: Any, state: Any) -> tuple[jax.Array, Any]:
        """Computes logits [B T V] and the state after the last token."""

    @abc.abstractmethod
    def state_bytes(self, tokens: int) -> StateBytes:
        """Computes the bytes of one row's state after some tokens."""


class BasedContestant(Contestant):
    """Any order of the mixers of BASED, attention and windows included."""

    def __init__(self, setting: Setting, layers: tuple[str, ...], **sizes: int):
        self.config = BasedConfig(
            vocab_size=setting.vocab_size,
            width=setting.width,
            layers=layers,
            mlp_width=2 * setting.width,
            **sizes,
        )

    def init(self, key):
        """Draws the parameters that are trained."""
        one = jnp.zeros((1, 1), jnp.int32)
        state = init_based_state(self.config)
        return Based(self.config).init(key, one, state)["params"]

    def start(self, params, batch):
        """Makes the state of rows that have read nothing."""
        return init_based_state(self.config, batch)

    def run(self, params, x, state):
        """Computes logits and the state after the last token."""
        return Based(self.config).apply({"params": params}, x, state)

    def state_bytes(self, tokens):
        """Computes the bytes of one row's state after some tokens."""
        return state_bytes(self.config, tokens)


class RWKVContestant(Contestant):
    """RWKV-7 with any head size and number of layers."""

    def __init__(self, setting: Setting, head_size: int, num_layers: int):
        config = rwkv.RWKV7Config(
            vocab_size=setting.vocab_size,
            num_layers=num_layers,
            width=setting.width,
            head_size=head_size,
            ffn_width=2 * setting.width,
            decay_rank=16,
            icl_rank=16,
            value_rank=16,
            gate_rank=16 if setting.width < 64 else 64,
        )
        self.model = rwkv.RWKV7(config)

    @property
    def config(self) -> rwkv.RWKV7Config:
        """The model's sizes."""
        return self.model.config

    def init(self, key):
        """Draws the parameters that are trained."""
        one = jnp.zeros((1, 1), jnp.int32)
        # Compiled: the orthogonal draws of every matrix, one by one, would take seconds.
        init = jax.jit(
            lambda key: self.model.init(key, one, rwkv.init_state(self.config))
        )
        return init(key)["params"]

    def start(self, params, batch):
        """Makes the state of rows that have read nothing."""
        return rwkv.init_state(self.config, batch)

    def run(self, params, x, state):
        """Computes logits and the state after the last token."""
        return self.model.apply({"params": params}, x, state)

    def state_bytes(self, tokens):
        """Computes the bytes of one row's state."""
        return state_bytes(self.config, tokens)


class UpscaledContestant(RWKVContestant):
    """RWKV-7 of one layer with a memory that it writes in context, all of it trained from scratch.

    The memory is read through random Fourier features, whose frequencies and phases are trained as
    well. It starts empty.
    """

    def __init__(self, setting: Setting, head_size: int, size: int, dynamics: str):
        super().__init__(setting, head_size, num_layers=1)
        self.size = size
        self.dynamics = dynamics

    def init(self, key):
        """Draws the model, the features and the strength of writes."""
        frequency_key, phase_key, model_key = jax.random.split(key, 3)
        lead = (1, 1, self.config.num_heads)
        shape = (*lead, self.size, self.config.head_size)
        frequencies = jax.random.normal(frequency_key, shape, jnp.float32)
        return {
            "model": super().init(model_key),
            "frequencies": frequencies * math.sqrt(2 * KERNEL_WIDTH),
            "phases": jax.random.uniform(phase_key, shape[:-1], maxval=2 * math.pi),
            "write": jnp.ones(lead, jnp.float32),
        }

    def start(self, params, batch):
        """Makes the state of rows that have read nothing, with the features in it."""
        features = Features(
            landmarks=params["frequencies"],
            widths=params["phases"],
            mean=jnp.zeros_like(params["phases"]),
            map=None,
            kind="fourier",
        )
        memory = empty_memory(features, dynamics=self.dynamics)
        memory = memory.replace(write=params["write"])
        state = rwkv.init_state(self.config).replace(upscaled=memory)
        return rwkv.repeat(state, batch)

    def run(self, params, x, state):
        """Computes logits and the state after the last token."""
        return super().run(params["model"], x, state)

    def state_bytes(self, tokens):
        """Computes the bytes of one row's state; the features are weights."""
        return state_bytes(self.config, tokens, memory_size=self.size)


class TunedContestant(RWKVContestant):
    """A frozen RWKV-7 of one layer whose upscaled start state alone is trained.

    Its features are fitted to rows of the task. The memory starts empty, and nothing writes to it.
    """

    def __init__(
        self, setting: Setting, head_size: int, size: int, dynamics: str, weights: Any
    ):
        super().__init__(setting, head_size, num_layers=1)
        self.size = size
        self.weights = weights
        shown, _ = rows(
            np.random.default_rng(TRAIN), 64, setting.train[-1], setting.vocab_size
        )
        self.state = rwkv.upscale(
            self.model, weights, shown, size=size, dynamics=dynamics
        )

    def init(self, key):
        """Returns an empty memory and the strength of its writes, 0."""
        upscaled = self.state.upscaled
        return {"memory": upscaled.memory, "write": upscaled.write}

    def start(self, params, batch):
        """Makes rows that all start from the tuned state."""
        upscaled = self.state.upscaled.replace(**params)
        return rwkv.repeat(self.state.replace(upscaled=upscaled), batch)

    def run(self, params, x, state):
        """Computes logits and the state after the last token."""
        return super().run(self.weights, x, state)

    def state_bytes(self, tokens):
        """Computes the bytes of one row's state; the features are weights."""
        return state_bytes(self.config, tokens, memory_size=self.size)


class Trainer:
    """The one recipe of all models, and one compiled program for all rates and seeds of a model.

    AdamW with gradients clipped at a norm of 1, weight decay of 0.1 on all that is not a vector, a
    warm-up over a tenth of the run and a cosine to a fiftieth. Parameters have a leading axis of
    rates, which read the same rows: models so small fill a GPU only together.
    """

    def __init__(self, contestant: Contestant, setting: Setting):
        self.contestant = contestant
        self.setting = setting
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b1=0.9, b2=0.98),
            optax.add_decayed_weights(0.1, mask=_matrices),
        )
        update = jax.vmap(self._update, in_axes=(0, 0, 0, None, None))
        self._step = jax.jit(update, donate_argnums=(0, 1))
        self._score = jax.jit(jax.vmap(self._loss, in_axes=(0, None, None)))

    def _loss(self, params, x, y):
        """Computes the mean nats and the share right of the asked places."""
        state = self.contestant.start(params, len(x))
        logits, _ = self.contestant.run(params, x, state)
        asked = y >= 0
        labels = jnp.maximum(y, 0)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        count = jnp.sum(asked)
        right = jnp.sum((jnp.argmax(logits, axis=-1) == y) & asked)
        return jnp.sum(jnp.where(asked, nats, 0.0)) / count, right / count

    def _update(self, params, opt_state, rate, x, y):
        gradients, _ = jax.grad(self._loss, has_aux=True)(params, x, y)
        updates, opt_state = self.optimizer.update(gradients, opt_state, params)
        moved = jax.tree.map(lambda old, change: old - rate * change, params, updates)
        return moved, opt_state

    def train(self, rates: tuple[float, ...], seed: int) -> tuple[Any, dict[str, Any]]:
        """Trains from one seed at several rates; ends when one of them has solved the task.

        Returns:
            Parameters with a leading axis of rates; steps made and CPU seconds of this process.
        """
        setting = self.setting
        one = self.contestant.init(jax.random.key(seed))
        params = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(rates)), one)
        opt_state = jax.vmap(self.optimizer.init)(params)
        rng = np.random.default_rng([seed, TRAIN])
        began = time.process_time()
        solved = 0
        done = 0
        check = setting.steps // 6
        while done < setting.steps and solved < 2:
            share = done / setting.steps
            size = draw_size(setting, share, rng)
            x, y = rows(rng, setting.rows, size, setting.vocab_size)
            factor = min(1.0, 10 * (done + 1) / setting.steps) * _cosine(share)
            now = jnp.asarray(factor * np.asarray(rates), jnp.float32)
            params, opt_state = self._step(params, opt_state, now, x, y)
            done += 1
            if done % check == 0:
                _, right = self.score(params, setting.train[-1], VALIDATION, 64)
                solved = solved + 1 if right.max() >= setting.solved else 0
        seconds = round(time.process_time() - began, 1)
        return params, {"steps": done, "cpu_s": seconds}

    def score(
        self, params: Any, size: Size, stream: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Measures mean nats and shares right, one for each rate, on fixed rows of a stream."""
        rng = np.random.default_rng([stream, size.tokens, size.pairs])
        found = []
        for _ in range(count // TEST_BATCH):
            x, y = rows(rng, TEST_BATCH, size, self.setting.vocab_size)
            found.append(np.asarray(self._score(params, x, y)))
        nats, right = np.mean(found, axis=0)
        return nats, right

    def cell(self, rates: tuple[float, ...], seed: int) -> list[dict[str, Any]]:
        """Trains, and measures each rate: its choice by validation, then the table's columns."""
        setting = self.setting
        params, took = self.train(rates, seed)
        count = setting.test_rows
        nats, valid = self.score(params, setting.train[-1], VALIDATION, count)
        tests = {}
        for size in setting.tests:
            tests[str(size)] = self.score(params, size, TEST, count)[1]
        results = []
        for i, rate in enumerate(rates):
            result = {
                "rate": rate,
                "seed": seed,
                "validation": round(float(valid[i]), 4),
                "validation_nats": round(float(nats[i]), 4),
                "tests": {
                    name: round(float(right[i]), 4) for name, right in tests.items()
                },
            }
            results.append(result | took)
        return results


def draw_size(setting: Setting, done: float, rng: Generator) -> Size:
    """Draws the size of a batch's rows after a share of the run; hard ones join one by one."""
    count = len(setting.train)
    if setting.unlock:
        count = min(count, 1 + int(done / setting.unlock))
    open_sizes = setting.train[:count]
    shares = np.array([size.share for size in open_sizes])
    return open_sizes[rng.choice(count, p=shares / shares.sum())]


def _cosine(share: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def contestant(
    name: str, setting: Setting, *, context: int | None = None
) -> Contestant:
    """Makes a model of the table from its name.

    attention, window-W, based-d and hybrid-d-W begin with a convolution; rwkv-N-L1 has heads of N
    and one layer; delta-N-M and decay-N-M have a memory of M features as well.

    Args:
        name: of the model.
        setting: the sizes that all models share.
        context: tokens for which full attention has room; None for the longest test.

    Raises:
        ValueError: no such name.
    """
    kind, *numbers = name.replace("-L", "-").split("-")
    if not all(number.isdigit() for number in numbers):
        raise ValueError(f"contestant: `name` must end with numbers; got {name!r}.")
    sizes = [int(number) for number in numbers]
    if context is None:
        context = max(size.tokens for size in setting.tests)
    conv = functools.partial(BasedContestant, setting, context=context)
    match kind, sizes:
        case "attention", []:
            return conv(layers=("conv", "attention"))
        case "window", [window]:
            return conv(layers=("conv", "window"), window=window)
        case "based", [size]:
            return conv(layers=("conv", "linear"), feature_size=size)
        case "hybrid", [size, window]:
            layers = ("conv", "linear", "window")
            return conv(layers=layers, feature_size=size, window=window)
        case "rwkv", [head_size, num_layers]:
            return RWKVContestant(setting, head_size, num_layers)
        case "delta" | "decay", [head_size, size]:
            return UpscaledContestant(setting, head_size, size, kind)
    raise ValueError(f"contestant: `name` must be one of the table's; got {name!r}.")
