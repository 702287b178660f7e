"""Arguments that `decorrelate` refuses, in one sentence."""

import re

import jax.numpy as jnp
import optax
import pytest
from decorrelation_problems import ADAM, GRADS, HEADS, PARAMS, SQUARE, STATS, M, N

from rwkv7_jax.optim.decorrelation import decorrelate


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "x"}, "`mode` must be one of online, exact, whiten; got 'x'."),
        ({"balance": 1.5}, "`balance` must be between 0 and 1; got 1.5."),
        ({"balance": -0.1}, "`balance` must be between 0 and 1; got -0.1."),
        ({"damping": -1e-3}, "`damping` must be at least 0; got -0.001."),
        ({"damping": float("nan")}, "`damping` must be at least 0; got nan."),
        ({"rate": -1}, "`rate` must be at least 0; got -1."),
        ({"average": 2}, "`average` must be between 0 and 1; got 2."),
        ({"every": 0}, "`every` must be at least 1; got 0."),
        ({"iterations": -1}, "`iterations` must be at least 0; got -1."),
        ({"clip": 0}, "`clip` must be above 0, or None; got 0."),
    ],
)
def test_settings_out_of_range_are_rejected_in_one_sentence(settings, words):
    with pytest.raises(ValueError, match=f"^decorrelate: {re.escape(words)}$"):
        decorrelate(optax.sgd(1.0), **settings)


def test_masks_of_the_wrong_structure_are_named():
    with pytest.raises(
        ValueError, match=r"`mask` must select .*; got \['b'\] of shape \(5,\)"
    ):
        decorrelate(ADAM, mask=True).init(PARAMS)
    with pytest.raises(ValueError, match="`mask` must have the parameters' structure"):
        decorrelate(ADAM, mask={"s": True}).init(PARAMS)


@pytest.mark.parametrize(
    ("stats", "error", "words"),
    [
        ({"s": STATS["s"]}, ValueError, "`stats` must have the gradients' structure"),
        (STATS["s"], ValueError, "`stats` must have the gradients' structure"),
        (
            STATS | {"s": jnp.zeros((M, M))},
            ValueError,
            "`stats`['s'] must have shape (2, 1, 3, 6",
        ),
        (STATS | {"s": jnp.zeros((*HEADS, N, N))}, ValueError, "got (2, 1, 3, 4, 4)."),
        (STATS | {"s": jnp.zeros((3, 1, 3, M, M))}, ValueError, "got (3, 1, 3, 6, 6)."),
        (STATS | {"b": jnp.zeros((5, 5))}, ValueError, "`stats`['b'] must be None"),
        (
            STATS | {"s": jnp.zeros(SQUARE, int)},
            TypeError,
            "`stats`['s'] must be a floating array",
        ),
        (
            STATS | {"s": [1.0]},
            TypeError,
            "`stats`['s'] must be a floating array; got <class 'list'>.",
        ),
    ],
)
def test_statistics_of_the_wrong_shape_are_named(stats, error, words):
    tx = decorrelate(ADAM)
    state = tx.init(PARAMS)
    with pytest.raises(error, match=re.escape(words)):
        tx.update(GRADS, state, PARAMS, stats=stats)
