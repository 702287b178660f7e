"""Multi-query associative recall: the published protocol, state sizes, and the trainer."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import mqar
from benchmarks.contestants import TunedContestant, contestant
from benchmarks.mqar import SMALL, Size, Trainer, draw_size, rows

NAMES = [
    "attention",
    "window-8",
    "based-4",
    "hybrid-8-16",
    "rwkv-16-L1",
    "rwkv-8-L2",
    "delta-8-24",
    "decay-8-24",
]


@pytest.mark.parametrize("size", [Size(64, 16), Size(64, 4), Size(128, 32)])
def test_every_key_occurs_in_one_pair_and_one_query(size):
    x, y = rows(np.random.default_rng(0), 64, size, 128)
    shown = 2 * size.pairs
    for ids, labels in zip(x, y, strict=True):
        known = dict(zip(ids[:shown:2], ids[1:shown:2], strict=True))
        asked = np.flatnonzero(labels >= 0)
        assert len(known) == len(set(known.values())) == len(asked) == size.pairs
        assert [known[key] for key in ids[asked]] == list(labels[asked])
        assert set(ids[asked]) == set(known)


def test_keys_and_values_split_the_vocabulary_without_zero():
    x, _ = rows(np.random.default_rng(0), 200, Size(64, 16), 128)
    keys = x[:, 0:32:2]
    values = x[:, 1:32:2]
    assert set(keys.ravel()) == set(range(1, 64))
    assert set(values.ravel()) == set(range(64, 128))


def test_queries_are_at_even_positions_after_the_pairs():
    _, y = rows(np.random.default_rng(0), 200, Size(64, 8), 128)
    assert (y[:, :16] == -1).all()
    assert (y[:, 1::2] == -1).all()


def test_values_are_not_fed_back():
    x, y = rows(np.random.default_rng(0), 400, Size(128, 8), 128)
    row, place = np.nonzero(y[:, :-1] >= 0)
    # What follows a key that is asked is a random token, its value by chance alone.
    share = np.mean(x[row, place + 1] == y[row, place])
    assert share < 0.03


def test_most_keys_are_queried_soon():
    """The first query is at the g-th free position with probability ~ g^-0.99."""
    _, y = rows(np.random.default_rng(0), 20_000, Size(64, 1), 128)
    places = (np.argmax(y >= 0, axis=1) - 2) // 2
    found = np.bincount(places, minlength=31) / len(places)
    wanted = np.arange(1, 32) ** (mqar.POWER - 1)
    wanted /= wanted.sum()
    np.testing.assert_allclose(found, wanted, atol=4 * np.sqrt(0.25 / len(places)))


def test_queries_are_not_in_the_order_of_the_pairs():
    x, y = rows(np.random.default_rng(0), 500, Size(64, 4), 128)
    first_asked = x[np.arange(500), np.argmax(y >= 0, axis=1)]
    # Each pair's key is asked first in about a quarter of the rows.
    shares = np.mean(first_asked[:, None] == x[:, 0:8:2], axis=0)
    np.testing.assert_allclose(shares, 0.25, atol=0.09)


def test_the_curriculum_adds_hard_rows_one_by_one():
    rng = np.random.default_rng(0)
    for done, pairs in (
        (0.0, {4}),
        (0.15, {4, 8}),
        (0.25, {4, 8, 16}),
        (0.9, {4, 8, 16}),
    ):
        assert {draw_size(SMALL, done, rng).pairs for _ in range(60)} == pairs


def test_sizes_are_sampled_by_their_shares():
    rng = np.random.default_rng(0)
    drawn = [draw_size(mqar.FULL, 0.0, rng).pairs for _ in range(2000)]
    assert abs(np.mean(np.array(drawn) == 4) - 0.56 / 1.0) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_state_bytes_match_the_arrays_carried_in_decoding(name):
    tokens = 48
    one = contestant(name, SMALL, context=tokens)

    def decode(key):
        params = one.init(key)
        ids = np.zeros((1, tokens), np.int32)
        return one.run(params, ids, one.start(params, 1))[1]

    end = jax.eval_shape(decode, jax.random.key(0))
    if getattr(end, "upscaled", None) is not None:
        # Features and the strength of writes are weights, the same for all sequences.
        memory = end.upscaled.memory
        end = [end.wkv, end.att_shift, end.ffn_shift, memory]
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(end)]
    assert one.state_bytes(tokens).total == sum(sizes)


@pytest.mark.parametrize("name", ["mamba", "based", "based-x", "rwkv-8", "window-1-2"])
def test_an_unknown_name_is_rejected(name):
    with pytest.raises(ValueError, match="contestant: `name` must"):
        contestant(name, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["based-4", "delta-8-24"])
def test_learning_rates_trained_together_are_independent(name):
    setting = dataclasses.replace(SMALL, steps=6, rows=4, test_rows=64)
    trainer = Trainer(contestant(name, setting), setting)
    rates = (0.001, 0.03)
    both, took = trainer.train(rates, seed=0)
    assert took["steps"] == 6
    nats, _ = trainer.score(both, SMALL.train[0], mqar.VALIDATION, 64)
    assert abs(nats[0] - nats[1]) > 0.02
    for index, rate in enumerate(rates):
        # Not the weights: Adam turns the rounding of the smallest gradients into whole steps.
        alone, _ = trainer.train((rate,), seed=0)
        one, _ = trainer.score(alone, SMALL.train[0], mqar.VALIDATION, 64)
        np.testing.assert_allclose(nats[index], one[0], rtol=1e-3)


@pytest.mark.slow
def test_a_frozen_model_with_an_empty_memory_is_unchanged():
    setting = dataclasses.replace(SMALL, steps=6, rows=4, test_rows=64)
    base = contestant("rwkv-16-L1", setting)
    weights = base.init(jax.random.key(0))
    tuned = TunedContestant(setting, 16, 8, "delta", weights)
    ids, _ = rows(np.random.default_rng(0), 2, Size(64, 4), 128)
    params = tuned.init(jax.random.key(1))
    logits, _ = tuned.run(params, ids, tuned.start(params, 2))
    wanted, _ = base.run(weights, ids, base.start(weights, 2))
    np.testing.assert_array_equal(logits, wanted)
    moved, _ = Trainer(tuned, setting).train((1.0,), seed=0)
    assert set(moved) == {"memory", "write"}
