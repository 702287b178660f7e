"""Decorrelated training of weights: the statistics of the projections' inputs, and learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import QUICK, lively, tokens
from tiny_models import SCANNED as CONFIG
from tolerances import SAME, assert_close

from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.optim.decorrelation import decorrelate
from rwkv7_jax.optim.optimizer import build_optimizer
from rwkv7_jax.training.losses import pretrain_loss
from rwkv7_jax.training.projection_statistics import (
    INPUTS,
    layer_statistics,
    projections,
    weight_decorrelator,
)
from rwkv7_jax.training.train_step import TrainState, make_train_step

MODEL = RWKV7(CONFIG)
BATCH = {"tokens": np.asarray(tokens(5, 24)), "mask": np.ones((5, 23), np.float32)}
STATISTICS = jax.jit(layer_statistics(MODEL, rows=3))


@pytest.fixture(scope="module")
def found():
    """The statistics of one batch."""
    return STATISTICS(lively(), BATCH)


def test_only_the_projections_have_statistics(found):
    flags = jax.tree.leaves(projections(lively()))
    given = jax.tree.structure(lively()).flatten_up_to(found)
    assert flags == [leaf is not None for leaf in given]
    assert sum(flags) == 2 * len(INPUTS)


def test_a_batch_without_input_tokens_has_no_statistics(unchecked):
    batch = {"tokens": BATCH["tokens"][:, :1], "mask": BATCH["mask"][:, :0]}
    sentence = r"^layer_statistics: `batch.tokens` must hold at least one input token"
    with pytest.raises(ValueError, match=sentence):
        layer_statistics(MODEL)(lively(), batch)


def test_second_moments_are_those_of_the_inputs_of_each_matrix(found):
    # Adding a matrix to a projection's weight changes its outputs by that matrix times its inputs;
    # the mean square of the change is tr(A C A^T).
    ids = jnp.asarray(BATCH["tokens"][:3, :-1])
    start = init_state(CONFIG, 3)
    change = jax.random.normal(jax.random.key(0), (CONFIG.ffn_width, CONFIG.width))
    apply = jax.jit(MODEL.apply, static_argnames="method")
    *_, trace = apply({"params": lively()}, ids, start, method="trace")
    moved = jnp.einsum("oi,lbti->lbto", change, trace["ffn_key_input"])
    moments = jnp.concatenate(
        [
            found["layer_0"]["ffn"]["key"]["weight"][None],
            found["layers"]["ffn"]["key"]["weight"],
        ]
    )
    expected = jnp.einsum("oi,lij,oj->l", change, moments, change)
    assert_close(
        jnp.mean(jnp.sum(moved**2, -1), (1, 2)), expected, SAME["model"], "square"
    )


@pytest.mark.parametrize(
    ("config", "block"),
    [(QUICK, "layer_0"), pytest.param(CONFIG, "layers", marks=pytest.mark.slow)],
    ids=["shallow", "deep"],
)
def test_dbp_leaves_other_parameters_to_the_inner_optimizer(config, block):
    tx = decorrelate(optax.sgd(1e-2), mask=projections)
    model = RWKV7(config)
    params = lively(config)
    statistics = layer_statistics(model, rows=3)
    loss = pretrain_loss(model, l2wrap=0.0)
    step = make_train_step(loss, tx, statistics=statistics)
    plain = make_train_step(loss, optax.sgd(1e-2))
    one, first = step(TrainState.create(params, tx), BATCH)
    two, _ = plain(TrainState.create(params, optax.sgd(1e-2)), BATCH)
    same = jax.tree.map(
        lambda a, b: np.allclose(a, b, rtol=1e-5, atol=1e-6), one.params, two.params
    )
    # Where the gradient is turned it differs, and nowhere else.
    turned = jax.tree.map(lambda equal: not equal, same)
    assert jax.tree.leaves(turned) == jax.tree.leaves(projections(params))
    for _ in range(5):
        one, last = step(one, BATCH)
    assert float(last["loss"]) < float(first["loss"])
    whitener = one.opt_state.whitener[block]["att"]["key"]["weight"]
    assert np.abs(np.asarray(whitener) - np.eye(config.width)).max() > 0.01


def off_diagonal_share(matrices):
    """The share of each matrix's squared entries that are not on its diagonal."""
    matrices = np.asarray(matrices, np.float64)
    squares = np.square(matrices)
    on_diagonal = np.square(np.diagonal(matrices, axis1=-2, axis2=-1)).sum(-1)
    return 1 - on_diagonal / squares.sum((-2, -1))


def test_dbp_decorrelates_the_inputs_of_the_projections():
    decorrelator = weight_decorrelator(RWKV7(QUICK), rows=3, damping=1e-2)
    tx = decorrelator.wrap(build_optimizer(1e-3, weight_decay=0.1))
    loss = pretrain_loss(RWKV7(QUICK))
    step = make_train_step(loss, tx, statistics=decorrelator.statistics)
    train = TrainState.create(lively(QUICK), tx)
    losses = []
    for _ in range(6):
        train, metrics = step(train, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert int(train.skipped) == 0
    layer = train.opt_state.whitener["layer_0"]
    moments = train.opt_state.covariance["layer_0"]
    for part, name in INPUTS:
        r = np.asarray(layer[part][name]["weight"], np.float64)
        c = np.asarray(moments[part][name]["weight"], np.float64)
        before = off_diagonal_share(c)
        after = off_diagonal_share(r @ c @ r.T)
        assert after < 0.5 * before, (part, name, before, after)


def test_without_decorrelation_the_optimizer_is_unchanged_and_takes_no_statistics():
    tx = optax.sgd(1e-2)
    decorrelator = weight_decorrelator(MODEL, method="none")
    assert decorrelator.wrap(tx) is tx
    assert decorrelator.statistics is None


def test_an_unknown_method_is_rejected_in_one_sentence():
    sentence = (
        "weight_decorrelator: `method` must be one of none, dbp, whiten; got 'online'"
    )
    with pytest.raises(ValueError, match=sentence):
        weight_decorrelator(MODEL, method="online")
