"""In which dtype devices add up gradients, and what that costs: docs/guide.md has the figures."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import SCANNED, lively, tokens

from rwkv7_jax import sharding
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.training.losses import pretrain_loss
from rwkv7_jax.training.train_step import TrainState, make_train_step

BF16 = dataclasses.replace(SCANNED, dtype="bfloat16")


def lowered_step(sizes):
    """A step of two rows on two devices, before it is compiled."""
    mesh = sharding.make_mesh(sizes, 2)
    tx = optax.sgd(0.1)
    step = make_train_step(pretrain_loss(RWKV7(BF16)), tx, mesh=mesh)
    train = sharding.place(mesh, TrainState.create(lively(BF16), tx))
    ids = np.asarray(tokens(2, 9, BF16))
    batch = {"tokens": ids, "mask": np.ones((2, 8), np.float32)}
    return step.lower(train, sharding.shard_batch(mesh, batch)).as_text()


def dtypes_of(collective, text):
    """The dtypes that a collective adds up, by the function inside of it."""
    body = rf'"stablehlo\.{collective}".*?\^bb0\(%\w+: tensor<(\w+)>'
    return set(re.findall(body, text, re.DOTALL))


def test_shards_of_gradients_are_added_in_the_dtype_of_activations():
    assert dtypes_of("reduce_scatter", lowered_step({"fsdp": 2})) == {"bf16"}


def test_gradients_of_whole_weights_are_added_in_float32():
    text = lowered_step({"data": 2})
    assert dtypes_of("reduce_scatter", text) == set()
    assert "f32" in dtypes_of("all_reduce", text)


def added_one_by_one(addends):
    """Sums that are rounded to bfloat16 after each addition."""
    total = addends[0]
    for addend in addends[1:]:
        total = (total.astype(np.float32) + addend.astype(np.float32)).astype(
            jnp.bfloat16
        )
    return total


def in_two_stages(addends):
    """The same, first among four neighbours, as more than eight devices do."""
    groups = addends.reshape(-1, 4, *addends.shape[1:])
    return added_one_by_one(np.stack([added_one_by_one(group) for group in groups]))


@pytest.mark.parametrize(("noise", "worst"), [(1, 0.005), (8, 0.006)])
def test_64_addends_in_bfloat16_lose_less_than_a_hundredth(noise, worst):
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(128, 128)) + noise * rng.normal(size=(64, 128, 128))
    addends = exact.astype(jnp.bfloat16)
    reference = exact.sum(0)

    def error(found):
        off = np.linalg.norm(found.astype(np.float64) - reference)
        return off / np.linalg.norm(reference)

    assert error(addends.astype(np.float32).sum(0)) < 0.0015
    assert 0.003 < error(in_two_stages(addends)) < worst
    assert error(added_one_by_one(addends)) < 0.01
