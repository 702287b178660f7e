"""Vectors in place of token ids: what the table would give, gradients, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import SMALLEST as CONFIG
from tiny_models import lively, random_state, tokens
from tolerances import SAME, assert_close

import rwkv7_jax as rwkv
from rwkv7_jax.model import time_shards

MODEL = rwkv.RWKV7(CONFIG)
IDS = tokens(2, 5, CONFIG)
STATE = random_state(CONFIG, 2)


def run(x, state=STATE, **options):
    """The model's results."""
    return MODEL.apply({"params": lively(CONFIG)}, x, state, **options)


def rows_of_table(ids=IDS):
    return lively(CONFIG)["emb"]["weight"][ids]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lengths": np.array([5, 2])},
        {"method": "hidden"},
        {"method": "trace", "names": ("residual",)},
    ],
)
def test_rows_of_the_table_are_read_as_their_ids_are(options):
    found = run(rows_of_table(), **options)
    wanted = run(IDS, **options)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_so_are_those_of_packed_rows():
    segment_ids = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    state = random_state(CONFIG, 4)
    found = run(rows_of_table(), state, segment_ids=segment_ids)
    wanted = run(IDS, state, segment_ids=segment_ids)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_their_gradient_adds_up_to_that_of_the_table():
    @jax.jit
    @jax.grad
    def of_vectors(x):
        return jnp.sum(jnp.sin(run(x)[0]))

    @jax.jit
    @jax.grad
    def of_table(table):
        params = {**lively(CONFIG), "emb": {"weight": table}}
        return jnp.sum(jnp.sin(MODEL.apply({"params": params}, IDS, STATE)[0]))

    table = lively(CONFIG)["emb"]["weight"]
    added = jnp.zeros_like(table).at[IDS].add(of_vectors(rows_of_table()))
    assert_close(added, of_table(table), SAME["gradient"], "table")


def test_vectors_of_another_width_and_new_weights_from_vectors_are_refused():
    with pytest.raises(ValueError, match=r"^RWKV7: `tokens` must have shape \[B T 32]"):
        run(jnp.zeros((2, 5, 31)))
    with pytest.raises(ValueError, match=r"^RWKV7\.init: `tokens` must be ids"):
        MODEL.init(jax.random.key(0), rows_of_table(), STATE)


def test_rows_of_vectors_are_filled_up_for_devices_along_time():
    filled, lengths = time_shards.fill_up(rows_of_table(), None, 4)
    assert filled.shape == (2, 8, CONFIG.width)
    np.testing.assert_array_equal(filled[:, :5], rows_of_table())
    assert lengths.tolist() == [5, 5]
    # Each device has a token even where there is none.
    filled, lengths = time_shards.fill_up(rows_of_table()[:, :0], None, 4)
    assert filled.shape == (2, 4, CONFIG.width)
    assert lengths.tolist() == [0, 0]
