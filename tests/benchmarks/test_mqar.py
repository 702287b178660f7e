"""Multi-query associative recall: the published protocol, the models' states, one trainer."""

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
def test_every_key_is_shown_once_and_asked_once(size):
    x, y = rows(np.random.default_rng(0), 64, size, 128)
    shown = 2 * size.pairs
    for ids, labels in zip(x, y, strict=True):
        known = dict(zip(ids[:shown:2], ids[1:shown:2], strict=True))
        asked = np.flatnonzero(labels >= 0)
        assert len(known) == len(set(known.values())) == len(asked) == size.pairs
        assert [known[key] for key in ids[asked]] == list(labels[asked])
        assert set(ids[asked]) == set(known)


def test_keys_and_values_are_halves_of_the_vocabulary_and_zero_is_neither():
    x, _ = rows(np.random.default_rng(0), 200, Size(64, 16), 128)
    keys = x[:, 0:32:2]
    values = x[:, 1:32:2]
    assert set(keys.ravel()) == set(range(1, 64))
    assert set(values.ravel()) == set(range(64, 128))


def test_nothing_is_asked_among_the_pairs_or_at_odd_places():
    _, y = rows(np.random.default_rng(0), 200, Size(64, 8), 128)
    assert (y[:, :16] == -1).all()
    assert (y[:, 1::2] == -1).all()


def test_values_are_not_fed_back():
    x, y = rows(np.random.default_rng(0), 400, Size(128, 8), 128)
    row, place = np.nonzero(y[:, :-1] >= 0)
    # What follows a key that is asked is a random token, its value by chance alone.
    share = np.mean(x[row, place + 1] == y[row, place])
    assert share < 0.03


def test_most_keys_are_asked_soon():
    """The g-th place of the rest is the first one drawn with probability ~ g^-0.99."""
    _, y = rows(np.random.default_rng(0), 20_000, Size(64, 1), 128)
    places = (np.argmax(y >= 0, axis=1) - 2) // 2
    found = np.bincount(places, minlength=31) / len(places)
    wanted = np.arange(1, 32) ** (mqar.POWER - 1)
    wanted /= wanted.sum()
    np.testing.assert_allclose(found, wanted, atol=4 * np.sqrt(0.25 / len(places)))


def test_the_order_of_questions_is_not_that_of_the_pairs():
    x, y = rows(np.random.default_rng(0), 500, Size(64, 4), 128)
    first_asked = x[np.arange(500), np.argmax(y >= 0, axis=1)]
    # Each pair's key is asked first in about a quarter of the rows.
    shares = np.mean(first_asked[:, None] == x[:, 0:8:2], axis=0)
    np.testing.assert_allclose(shares, 0.25, atol=0.09)


def test_hard_rows_join_one_by_one():
    rng = np.random.default_rng(0)
    for done, pairs in (
        (0.0, {4}),
        (0.15, {4, 8}),
        (0.25, {4, 8, 16}),
        (0.9, {4, 8, 16}),
    ):
        assert {draw_size(SMALL, done, rng).pairs for _ in range(60)} == pairs


def test_sizes_are_drawn_by_their_shares():
    rng = np.random.default_rng(0)
    drawn = [draw_size(mqar.FULL, 0.0, rng).pairs for _ in range(2000)]
    assert abs(np.mean(np.array(drawn) == 4) - 0.56 / 1.0) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_in_the_table_are_those_of_the_arrays_that_decoding_carries(name):
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
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match="contestant: `name` must"):
        contestant(name, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["based-4", "delta-8-24"])
def test_rates_that_are_trained_at_once_do_not_touch_each_other(name):
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
def test_a_frozen_model_stays_as_it_is_and_its_empty_memory_changes_nothing():
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
