"""A stack of start states: together as alone, and what happens to one is nothing to the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from tiny_models import QUICK, lively, tokens
from tolerances import SAME, assert_close, assert_trees_close

from rwkv7_jax import sharding
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.optim.optimizer import build_optimizer
from rwkv7_jax.training.stacked_step import (
    create_stack,
    make_stacked_step,
    params_of,
    stack_params,
)
from rwkv7_jax.training.train_step import TrainState, make_train_step
from rwkv7_jax.tuning.read_statistics import state_decorrelator
from rwkv7_jax.tuning.state_tuning import state_loss

RATES = np.asarray([0.1, 0.03, 0.2, 0.01], np.float32)
SETS = len(RATES)
ROWS = 2
MODEL = RWKV7(QUICK)
# Adam divides by the size of its gradient: a larger epsilon keeps rounding from being enlarged.
OPTIMIZER = build_optimizer(1.0, clip=0.05, eps=1e-5)
PLAIN = optax.sgd(1.0)
# What a step is made with unless a test says otherwise.
CHOICES = {"method": "dbp", "accumulate": 1}


@functools.cache
def parts(method):
    """The loss with an anchor, and what wraps the optimizer."""
    params = lively(QUICK)
    loss = state_loss(MODEL, params, anchor=0.5, l2wrap=1e-2)
    decorrelator = state_decorrelator(
        MODEL, params, init_state(QUICK), method=method, rows=1
    )
    return loss, decorrelator


def batch_of(index: int, step: int) -> Batch:
    """The rows of one set; each counts another number of targets."""
    mask = np.ones((ROWS, 6), np.float32)
    mask[0, : 1 + index] = 0
    seed = 100 * index + step
    return Batch(
        tokens=tokens(ROWS, 7, QUICK, seed=seed),
        mask=mask,
        anchor=tokens(ROWS, 7, QUICK, seed=seed + 50),
    )


def joined(batches: list[Batch]) -> Batch:
    return jax.tree.map(lambda *rows: np.concatenate(rows), *batches)


@functools.cache
def stacked(rates, *, method, **choices):
    """The optimizer and the step of all sets: once, however many tests take it."""
    loss, decorrelator = parts(method)
    tx = decorrelator.wrap(OPTIMIZER)
    rates = np.asarray(rates, np.float32)
    statistics = decorrelator.statistics
    return tx, make_stacked_step(loss, tx, rates, statistics=statistics, **choices)


def together(start, batches, *, rates=RATES, mesh=None, **choices):
    """Tunes all sets at once; gives the end and the metrics of the last step."""
    choices = CHOICES | choices
    tx, step = stacked(tuple(rates.tolist()), mesh=mesh, **choices)
    train = create_stack(start, tx)
    train = sharding.place(mesh, train)
    metrics = {}
    for batch in batches:
        train, metrics = step(train, sharding.shard_batch(mesh, batch))
    return train, metrics


@functools.cache
def single(*, accumulate, method):
    """The optimizer and the step of one set; its rate is a number of the optimizer's state."""
    loss, decorrelator = parts(method)
    scale = optax.inject_hyperparams(optax.scale)(step_size=1.0)
    tx = decorrelator.wrap(optax.chain(OPTIMIZER, scale))
    return tx, make_train_step(
        loss, tx, statistics=decorrelator.statistics, accumulate=accumulate
    )


def alone(start, batches, rate, **choices):
    """Tunes one set at a rate."""
    tx, step = single(**choices)
    train = TrainState.create(start, tx)
    train = train.replace(opt_state=optax.tree.set(train.opt_state, step_size=rate))
    metrics = {}
    for batch in batches:
        train, metrics = step(train, batch)
    return train, metrics


def starts() -> list:
    return [init_state(QUICK)] * SETS


# Of few steps: DBP enlarges the rounding in which the two programs differ, from step to step.
@pytest.mark.parametrize(
    ("method", "steps", "accumulate"), [("none", 4, 1), ("dbp", 2, 2)]
)
def test_stacked_sets_match_separate_sets(method, steps, accumulate):
    choices = {"accumulate": accumulate, "method": method}
    batches = []
    for step in range(steps):
        batches.append(joined([batch_of(i, step) for i in range(SETS)]))
    train, metrics = together(stack_params(starts()), batches, **choices)
    assert int(train.step) == steps
    for index, rate in enumerate(RATES):
        own = [batch_of(index, step) for step in range(steps)]
        expected, expected_metrics = alone(starts()[index], own, rate, **choices)
        assert_trees_close(
            params_of(train.params, index), expected.params, SAME["model"]
        )
        # Not the anchor's divergence, a small difference of large numbers.
        for name in ("loss", "loss_nats", "grad_norm", "state_max", "state_rms"):
            value = expected_metrics[name]
            assert_close(metrics[name][index], value, SAME["model"], name)


def test_a_non_finite_gradient_stops_only_its_own_set():
    batches = [joined([batch_of(i, step) for i in range(SETS)]) for step in range(2)]
    expected, _ = together(stack_params(starts()), batches)
    broken = starts()
    broken[1] = broken[1].replace(wkv=broken[1].wkv + jnp.nan)
    train, metrics = together(stack_params(broken), batches)
    assert np.asarray(train.skipped).tolist() == [0, 2, 0, 0]
    assert np.asarray(metrics["updated"]).tolist() == [1, 0, 1, 1]
    for index in (0, 2, 3):
        jax.tree.map(
            np.testing.assert_array_equal,
            params_of((train.params, train.opt_state), index),
            params_of((expected.params, expected.opt_state), index),
        )


def test_a_set_with_rate_zero_does_not_move():
    batch = joined([batch_of(i, 0) for i in range(SETS)])
    train, _ = together(stack_params(starts()), [batch], rates=np.zeros(SETS))
    assert not np.any(train.params.wkv)


@pytest.mark.parametrize(("at_once", "method"), [(1, "none"), (3, "dbp")])
def test_sets_in_groups_differ_by_rounding_only(at_once, method):
    batch = joined([batch_of(i, 0) for i in range(SETS)])
    expected, metrics = together(stack_params(starts()), [batch], method=method)
    choices = {"method": method, "at_once": at_once}
    train, few = together(stack_params(starts()), [batch], **choices)
    assert_trees_close(train.params, expected.params, SAME["model"])
    assert_close(few["loss"], metrics["loss"], SAME["model"])


def test_sharding_the_sets_differs_by_rounding_only():
    batch = joined([batch_of(i, 0) for i in range(SETS)])
    expected, metrics = together(stack_params(starts()), [batch])
    mesh = sharding.make_mesh("auto", SETS)
    assert mesh is not None and SETS % mesh.size == 0
    train, sharded = together(stack_params(starts()), [batch], mesh=mesh)
    assert_trees_close(train.params, expected.params, SAME["model"])
    assert_close(sharded["loss"], metrics["loss"], SAME["model"])


def test_indivisible_sets_are_updated_on_every_device():
    batches = [batch_of(i, 0) for i in range(SETS)]
    expected, metrics = together(stack_params(starts()), [joined(batches)])
    # The frozen weights lie in shards.
    few = SETS - 1
    mesh = sharding.make_mesh({"fsdp": 2}, few)
    start = stack_params(starts()[:few])
    batch = joined(batches[:few])
    train, sharded = together(start, [batch], rates=RATES[:few], mesh=mesh)
    first = jax.tree.map(lambda leaf: leaf[:few], expected.params)
    assert_trees_close(train.params, first, SAME["model"])
    assert_close(sharded["loss"], metrics["loss"][:few], SAME["model"])


def test_devices_of_the_sequence_axis_share_the_sets():
    batch = joined([batch_of(i, 0) for i in range(SETS)])
    start = stack_params(starts())
    expected, metrics = together(start, [batch])
    mesh = sharding.make_mesh({"sequence": 2}, SETS)
    train, sharded = together(start, [batch], mesh=mesh)
    assert_trees_close(train.params, expected.params, SAME["model"])
    assert_close(sharded["loss"], metrics["loss"], SAME["model"])
    assert flops(mesh, start, batch) < 0.6 * flops(None, start, batch)


def flops(mesh, start, batch) -> float:
    """Counts what one device computes in a step of all sets."""
    tx, step = stacked(tuple(RATES.tolist()), mesh=mesh, **CHOICES)
    train = sharding.place(mesh, create_stack(start, tx))
    program = step.lower(train, sharding.shard_batch(mesh, batch)).compile()
    return program.cost_analysis()["flops"]


def test_a_tensor_axis_is_rejected():
    mesh = sharding.make_mesh({"tensor": 2}, SETS)
    with pytest.raises(ValueError, match=r"`mesh` must have no tensor axis: .* of 2\."):
        make_stacked_step(Partial(square), PLAIN, RATES, mesh=mesh)


def square(params, batch):
    return jnp.sum(jnp.square(params["x"])) * jnp.mean(batch["tokens"]), {}


def numbers(rows: int) -> dict:
    return {"tokens": jnp.ones((rows, 3)), "mask": jnp.ones((rows, 2))}


def test_all_sets_are_one_program_which_compiles_once():
    traces = []

    def loss(frozen, params, batch):
        traces.append(1)
        return square({"x": params["x"] * frozen}, batch)

    step = make_stacked_step(Partial(loss, jnp.ones(3)), PLAIN, RATES)
    train = create_stack({"x": jnp.ones((SETS, 3))}, PLAIN)
    for _ in range(3):
        train, _ = step(train, numbers(SETS))
    assert len(traces) == 1


def test_arguments_of_the_wrong_size_are_rejected_in_one_sentence():
    with pytest.raises(ValueError, match="`rates` must hold one number per set"):
        make_stacked_step(square, PLAIN, np.ones((2, 2)))
    for wrong in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"`rates` must be at least 0.*; got"):
            make_stacked_step(square, PLAIN, np.array([0.1, wrong]))
    step = make_stacked_step(square, PLAIN, RATES)
    train = create_stack({"x": jnp.ones((SETS, 3))}, PLAIN)
    sentence = "the number of `rates` must divide the 6 rows of the batch's"
    with pytest.raises(ValueError, match=sentence):
        step(train, numbers(6))
    pieces = make_stacked_step(square, PLAIN, RATES, accumulate=3)
    sentence = (
        "make_stacked_step: the number of `rates` x `accumulate` must divide the 8"
    )
    with pytest.raises(ValueError, match=sentence):
        pieces(train, numbers(8))
    sentence = "make_stacked_step: the batch's scale must have rows, which the number"
    with pytest.raises(ValueError, match=sentence):
        step(train, {**numbers(8), "scale": np.float32(2)})
