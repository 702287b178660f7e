"""Statistics that a train step reads from the loss's own forward pass."""

import jax
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from tiny_models import QUICK, lively, tokens
from tolerances import assert_trees_close

from rwkv7_jax import sharding
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.training.losses import pretrain_loss
from rwkv7_jax.training.projection_statistics import weight_decorrelator
from rwkv7_jax.training.shared_pass import can_share_pass, reads_most_rows
from rwkv7_jax.training.train_step import TrainState, make_train_step
from rwkv7_jax.tuning.read_statistics import state_decorrelator, state_statistics
from rwkv7_jax.tuning.state_tuning import state_loss
from rwkv7_jax.tuning.upscaling import upscale

MODEL = RWKV7(QUICK)
BATCH = {
    "tokens": np.asarray(tokens(4, 9)),
    "mask": np.asarray(tokens(4, 8) % 2, np.float32),
}


def upscaled_state(params):
    return upscale(MODEL, params, BATCH["tokens"][:, :-1], size=8, dynamics="delta")


def make(kind, rows=3):
    """A loss, its decorrelator and the parameters that are trained."""
    params = lively(QUICK)
    if kind == "weights":
        return pretrain_loss(MODEL), weight_decorrelator(MODEL, rows=rows), params
    leaf = "wkv" if kind == "start state" else "memory"
    start = init_state(QUICK) if leaf == "wkv" else upscaled_state(params)
    loss = state_loss(MODEL, params, leaves=(leaf,))
    decorrelator = state_decorrelator(
        MODEL, params, start, leaves=(leaf,), method="dbp", rows=rows
    )
    return loss, decorrelator, start


def without_trace(loss):
    """The loss as a plain function, which hands out no trace: the step makes a second pass."""
    return Partial(lambda *x: loss(*x))


@pytest.mark.parametrize("kind", ["start state", "memory", "weights"])
def test_statistics_from_the_shared_pass_match_a_separate_pass(kind):
    loss, decorrelator, start = make(kind)
    alone = without_trace(loss)
    tx = decorrelator.wrap(optax.adam(1e-2))
    results = []
    for given in (loss, alone):
        step = make_train_step(given, tx, statistics=decorrelator.statistics)
        train = TrainState.create(start, tx)
        compiled = step.lower(train, BATCH).compile()
        train, _ = compiled(*step.args, train, BATCH)
        results.append((train, compiled.cost_analysis()["flops"]))
    (shared, few), (separate, many) = results
    assert_trees_close(shared.opt_state, separate.opt_state, 1e-4)
    assert few < many


@pytest.mark.parametrize("kind", ["start state", "weights"])
def test_few_rows_of_a_batch_are_read_in_a_separate_pass(kind):
    products = {}
    for rows in (1, 2):
        loss, decorrelator, start = make(kind, rows=rows)
        tx = decorrelator.wrap(optax.adam(1e-2))
        train = TrainState.create(start, tx)
        for name, given in (("same", loss), ("other", without_trace(loss))):
            step = make_train_step(given, tx, statistics=decorrelator.statistics)
            text = step.lower(train, BATCH).as_text()
            products[name, rows] = text.count("dot_general")
    # Of four rows, two are worth the memory of the trace of all.
    assert products["same", 1] == products["other", 1]
    assert products["same", 2] < products["other", 2]


def test_rows_are_those_of_a_device():
    statistics = state_statistics(MODEL, lively(QUICK), rows=2)
    assert reads_most_rows(statistics, 4) and not reads_most_rows(statistics, 5)
    with sharding.use_mesh(sharding.make_mesh({"data": 2}, 8)):
        assert reads_most_rows(statistics, 8) and not reads_most_rows(statistics, 10)


def test_other_weights_and_accumulation_need_a_separate_pass():
    params = lively(QUICK)
    loss = state_loss(MODEL, params)
    copies = jax.tree.map(lambda leaf: leaf + 0, params)
    assert can_share_pass(loss, state_statistics(MODEL, params), 1)
    assert not can_share_pass(loss, state_statistics(MODEL, copies), 1)
    assert not can_share_pass(loss, state_statistics(MODEL, params), 2)
    assert not can_share_pass(without_trace(loss), state_statistics(MODEL, params), 1)
    assert not can_share_pass(loss, None, 1)
