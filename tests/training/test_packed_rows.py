"""Losses and statistics of packed rows equal those of the same documents in rows of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import QUICK, SHALLOW, lively, random_state
from tolerances import assert_trees_close

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.batching import batch_at
from rwkv7_jax.data.token_streams import TokenArray, TokenStream
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.observer.loss import observer_loss
from rwkv7_jax.observer.observer import init_observer
from rwkv7_jax.test_time.losses import distillation_loss, policy_loss
from rwkv7_jax.training.losses import pretrain_loss
from rwkv7_jax.training.projection_statistics import layer_statistics
from rwkv7_jax.training.train_step import TrainState, make_train_step
from rwkv7_jax.tuning.read_statistics import state_statistics
from rwkv7_jax.tuning.state_tuning import state_loss

SIZES = (5, 9, 2, 14, 6, 17, 3, 8)
LENGTH = 24


@functools.cache
def batches():
    """Makes a batch of packed rows, and one of the same documents."""
    ids = np.random.default_rng(0).integers(1, QUICK.vocab_size, sum(SIZES))
    starts = np.cumsum([0, *SIZES])
    stream = TokenStream.of_array(TokenArray(ids, starts=starts))
    make = functools.partial(batch_at, stream, 0, length=LENGTH)
    packed = make(batch_size=3, packing="packed")
    alone = make(batch_size=len(SIZES), packing="documents")
    assert packed.mask.sum() == alone.mask.sum() == sum(SIZES) - len(SIZES)
    return packed, alone


def gradients(loss, params):
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return [grad(params, batch) for batch in batches()]


@functools.cache
def pretraining(config):
    """The losses of weights and their gradients, of packed rows and of single documents."""
    return gradients(pretrain_loss(RWKV7(config), l2wrap=0.0), lively(config))


@pytest.mark.parametrize("config", [QUICK, SHALLOW], ids=["scan", "chunked"])
def test_packing_does_not_change_pretraining(config):
    found, expected = pretraining(config)
    assert_trees_close({"x": found[0]}, {"x": expected[0]}, 1e-6)
    assert_trees_close({"x": found[1]}, {"x": expected[1]}, 1e-5)


def test_packing_does_not_change_state_tuning():
    model = RWKV7(QUICK)
    loss = state_loss(model, lively(QUICK), leaves=("wkv", "att_shift", "ffn_shift"))
    found, expected = gradients(loss, random_state(QUICK))
    assert_trees_close({"x": found[0]}, {"x": expected[0]}, 1e-6)
    assert_trees_close({"x": found[1]}, {"x": expected[1]}, 1e-5)


def test_packing_does_not_change_the_statistics_of_the_start_state():
    model = RWKV7(QUICK)
    statistics = state_statistics(model, lively(QUICK))
    found, expected = (
        jax.jit(statistics)(random_state(QUICK), batch).wkv for batch in batches()
    )
    assert_trees_close({"x": found}, {"x": expected}, 1e-5)


def test_packing_does_not_change_the_statistics_of_weights():
    """Padding counts in them, so that they are compared with full rows."""
    model = RWKV7(QUICK)
    tokens = np.random.default_rng(0).integers(1, QUICK.vocab_size, (4, 11))
    mask = np.ones((4, 10), np.float32)
    alone = Batch(tokens=tokens, mask=mask)
    pairs = np.concatenate([tokens[::2, :-1], tokens[1::2]], axis=1)
    packed = Batch(
        tokens=pairs,
        mask=np.ones((2, 20), np.float32),
        segments=np.array([[0, 10], [0, 10]]),
    )
    run = jax.jit(layer_statistics(model))
    found = run(lively(QUICK), packed)
    expected = run(lively(QUICK), alone)
    assert_trees_close({"x": found}, {"x": expected}, 1e-5)


def test_pieces_of_a_packed_batch_add_up():
    packed, _ = batches()
    tx = optax.sgd(1.0)
    loss = pretrain_loss(RWKV7(QUICK), l2wrap=0.0)
    step = make_train_step(loss, tx, accumulate=3)
    params = jax.tree.map(jnp.copy, lively(QUICK))
    train, _ = step(TrainState.create(params, tx), packed)
    (_, whole), _ = pretraining(QUICK)
    expected = jax.tree.map(jnp.subtract, lively(QUICK), whole)
    assert_trees_close({"x": train.params}, {"x": expected}, 1e-5)


def test_a_loss_without_support_for_packed_rows_rejects_them(unchecked):
    packed, _ = batches()
    rows = packed.tokens.shape[0]
    packed = packed.replace(
        advantages=np.ones(rows, np.float32), split=np.ones(rows, np.int32)
    )
    model = RWKV7(QUICK)
    state = init_state(QUICK)
    observer, params = init_observer(QUICK, QUICK, jax.random.key(0))
    losses = {
        "distillation_loss": (distillation_loss(model, lively(QUICK)), state),
        "policy_loss": (policy_loss(model, lively(QUICK)), state),
        "observer_loss": (observer_loss(observer, model, lively(QUICK)), params),
    }
    for name, (loss, trained) in losses.items():
        sentence = f"^{name}: `batch` must have one sequence per row here"
        with pytest.raises(ValueError, match=sentence):
            loss(trained, packed)


def test_segments_must_match_the_rows(unchecked):
    packed, _ = batches()
    with pytest.raises(
        ValueError, match=r"`batch.segments` must have shape \(3, 'K'\)"
    ):
        Batch.of(packed.replace(segments=packed.segments[:2]), packed=True)
