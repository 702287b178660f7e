"""Prompt/continuation splits: where rows are cut, and the parts after the cut."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_observers
from tiny_observers import LENGTH

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.observer.prompt_splits import (
    add_prompt_splits,
    continuations,
    count_answers,
)

batch = pytest.fixture(tiny_observers.batch, scope="module")


def test_the_part_after_the_split_is_moved_to_the_front():
    tokens = jnp.arange(10).reshape(2, 5)
    inputs, targets, shares = continuations(tokens, jnp.array([1, 3]), jnp.ones((2, 4)))
    np.testing.assert_array_equal(inputs[0, :3], [1, 2, 3])
    np.testing.assert_array_equal(targets[0, :3], [2, 3, 4])
    assert (int(inputs[1, 0]), int(targets[1, 0])) == (8, 9)
    np.testing.assert_allclose(shares, [[0.25] * 3 + [0], [0.25, 0, 0, 0]])


def test_splits_depend_only_on_seed_and_step(batch):
    one, two, three = (add_prompt_splits(batch, 1, step)["split"] for step in (5, 5, 6))
    np.testing.assert_array_equal(one, two)
    assert (one != three).any()
    # A process that makes some of the rows draws what they have in the batch of all.
    rest = Batch.of(batch).select_rows(slice(2, None))
    own = add_prompt_splits(rest, 1, 5, first=2)["split"]
    np.testing.assert_array_equal(own, one[2:])
    many = {"tokens": np.zeros((400, LENGTH + 1), np.int32)}
    drawn = add_prompt_splits(many, 0, 0, least=2, most=5)["split"]
    assert set(drawn.tolist()) == {2, 3, 4, 5}
    assert set(add_prompt_splits(many, 0, 0)["split"].tolist()) == set(range(1, LENGTH))


def test_answers_are_counted_from_the_first_target_after_a_split():
    mask = np.zeros((2, 4), np.float32)
    mask[0, 1:3] = 1
    mask[1, :3] = 1
    rows = Batch(tokens=np.zeros((2, 5), np.int32), mask=mask, split=np.array([1, 3]))
    assert count_answers(rows) == 2
    assert count_answers(rows.replace(split=np.array([3, 2]))) == 1
