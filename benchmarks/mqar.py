"""Multi-query associative recall: its rows, its sizes, and the trainer of all models.

A row shows pairs of a key and a value, then asks for each key once, between random tokens. The
value is the label at the key's position and is not fed back. `benchmarks.recall` makes the table.

Source: the protocol of Arora et al. 2024 (arXiv 2402.18668), as HazyResearch/zoology generates it
in zoology/data/multiquery_ar.py. There, pairs that are shown first tend to be asked first. Here the
order of the questions is drawn independently.
"""

import abc
import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.random import Generator

from rwkv7_jax.based import StateBytes

# Streams of random rows: of training, of the choice of a rate and an end, and of the table.
TRAIN = 7
VALIDATION = 98
TEST = 99

# Rows that are tested at once.
TEST_BATCH = 64


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
        solved: accuracy on the hardest training size that ends a run if reached twice in a row.
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

# From so many numbers on, few of them are drawn without sorting all.
MANY = 1024

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
    # Sorting thousands of numbers for each row takes longer than a step on a GPU. Rows with a
    # number twice are drawn again: with so few numbers of so many, most have none.
    if below >= MANY and size * size <= 2 * below:
        drawn = rng.integers(0, below, (count, size))
        while len(again := np.flatnonzero(_has_equal(drawn))):
            drawn[again] = rng.integers(0, below, (len(again), size))
        return drawn
    return np.argsort(rng.random((count, below)), axis=1)[:, :size]


def _has_equal(numbers: np.ndarray) -> np.ndarray:
    """Tells for each row whether a number stands in it twice."""
    return np.any(np.diff(np.sort(numbers, axis=1), axis=1) == 0, axis=1)


class Contestant(abc.ABC):
    """A model of the table: parameters, a start state, a call, and what its state weighs.

    Attributes:
        config: the sizes, of the model's own kind.
    """

    config: Any

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


class Trainer:
    """The one recipe of all models, and one compiled program for all rates and seeds of a model.

    AdamW with gradients clipped at a norm of 1, weight decay of 0.1 on leaves of two axes or more
    (of a memory also its phases and strengths), a warm-up over a tenth of the run and a cosine to a
    fiftieth. Parameters have a leading axis of rates, which read the same rows: models so small
    fill a GPU only together.
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
        """Computes the mean nats and the accuracy at the positions of the questions."""
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
