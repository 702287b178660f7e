"""A step that measures the training speed and memory of a model on this device."""

import functools
import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import rwkv7_jax as rwkv
from benchmarks import decode
from benchmarks.device.sizes import Job, Jobs, Sizes, kernels
from benchmarks.timing import RepeatedStep, time_call
from rwkv7_jax.tuning.read_statistics import state_decorrelator

# Start states, all weights, and the memory of an upscaled state, by Adam and by DBP.
TRAINED = ("state", "weights", "memory", "memory by DBP")
FEATURES = 256


class Choice(NamedTuple):
    """One way to train.

    Attributes:
        trained: one of `TRAINED`.
        rows: of a batch.
        implementation: of the op.
        remat: what the backward pass computes again.
    """

    trained: str
    rows: int
    implementation: str | None
    remat: str


def steps(sizes: Sizes) -> Jobs:
    """Times steps of state tuning and pre-training, by rows, implementation and remat."""
    for choice in _choices(sizes):
        yield Job(choice._asdict(), functools.partial(_time_step, sizes, choice))


def _choices(sizes: Sizes) -> Iterator[Choice]:
    """Yields the usual choice, and those that differ from it in one thing."""
    rows, *other_rows = sizes.batches
    remat, *other_remats = sizes.remats
    others = [] if sizes.interpret else [*kernels(sizes)[1:], "chunked"]
    # A rehearsal tries what differs most: hardly anything is as slow here as to compile a step.
    for trained in TRAINED[::3] if sizes.interpret else TRAINED:
        yield Choice(trained, rows, None, remat)
    for trained, other in itertools.product(TRAINED[:2], other_remats):
        yield Choice(trained, rows, None, other)
    for trained, name in itertools.product(TRAINED[:2], others):
        yield Choice(trained, rows, name, remat)
    for trained, number in itertools.product(TRAINED[:2], other_rows):
        yield Choice(trained, number, None, remat)


@functools.cache
def random_weights(sizes: Sizes):
    """Makes random weights in bfloat16."""
    vocabulary, layers, width = sizes.model
    _, params = decode.random_model(layers, width, vocabulary)
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def model_of(sizes: Sizes, **options) -> rwkv.RWKV7:
    """Makes the model of the steps, in bfloat16."""
    vocabulary, layers, width = sizes.model
    config = rwkv.RWKV7Config(
        vocab_size=vocabulary,
        num_layers=layers,
        width=width,
        dtype="bfloat16",
        **options,
    )
    return rwkv.RWKV7(config)


def _make_step(sizes: Sizes, choice: Choice):
    """Makes a train step and the state that it starts from."""
    model = model_of(sizes, implementation=choice.implementation, remat=choice.remat)
    weights = random_weights(sizes)
    tx = optax.adam(1e-3)
    if choice.trained == "weights":
        # A copy: a step takes what it is given.
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
        loss = rwkv.pretrain_loss(model)
        return rwkv.make_train_step(loss, tx), rwkv.TrainState.create(wide, tx)
    if choice.trained == "state":
        loss = rwkv.state_loss(model, weights)
        train = rwkv.TrainState.create(rwkv.init_state(model.config), tx)
        return rwkv.make_train_step(loss, tx), train
    size = 2 * model.config.head_size if sizes.interpret else FEATURES
    start = rwkv.upscale(model, weights, _ids(sizes, 1), size=size)
    leaves = ("memory",)
    decorrelator = state_decorrelator(
        model,
        weights,
        start,
        leaves=leaves,
        method="dbp" if choice.trained == "memory by DBP" else "none",
        rows=choice.rows,
    )
    tx = decorrelator.wrap(tx)
    loss = rwkv.state_loss(model, weights, leaves=leaves)
    step = rwkv.make_train_step(loss, tx, statistics=decorrelator.statistics)
    return step, rwkv.TrainState.create(start, tx)


def _ids(sizes: Sizes, rows: int) -> jax.Array:
    shape = (rows, sizes.length + 1)
    return jax.random.randint(jax.random.key(0), shape, 1, sizes.model[0])


def _time_step(sizes: Sizes, choice: Choice) -> dict:
    step, train = _make_step(sizes, choice)
    batch = {
        "tokens": _ids(sizes, choice.rows),
        "mask": jnp.ones((choice.rows, sizes.length), jnp.float32),
    }
    if sizes.warm:
        # Several processes have no room for the arrays of their steps at once.
        began = time.perf_counter()
        compiled = step.lower(train, batch).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return {
            "compile s": time.perf_counter() - began,
            "temp GiB": memory.temp_size_in_bytes / 2**30,
        }
    run = RepeatedStep(step, train, batch)
    # The first one compiles.
    first, *walls = [time_call(run).wall for _ in range(1 + sizes.repeats)]
    least = min(walls)
    return {
        "ms": 1e3 * least,
        "tokens/s": choice.rows * sizes.length / least,
        "first call s": first,
        "loss": float(run.metrics["loss"]),
    }
