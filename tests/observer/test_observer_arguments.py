"""Arguments that an observer's functions refuse, in one sentence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_observers
from tiny_observers import LENGTH, ROWS, SMALL, TEACHER

from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state, repeat
from rwkv7_jax.observer.evaluation import evaluate_handover, proposal_error
from rwkv7_jax.observer.loss import observer_loss
from rwkv7_jax.observer.observer import Observer, init_observer, propose
from rwkv7_jax.observer.prompt_splits import add_prompt_splits

mirror = pytest.fixture(tiny_observers.mirror, scope="module")
teacher = pytest.fixture(tiny_observers.teacher, scope="module")
made = pytest.fixture(tiny_observers.made, scope="module")
batch = pytest.fixture(tiny_observers.batch, scope="module")


def test_other_vocabularies_and_sizes_are_rejected(made, teacher):
    other = dataclasses.replace(TEACHER, vocab_size=24)
    with pytest.raises(
        ValueError,
        match=r"init_observer: `model` must have the teacher's vocab_size 24; got 23",
    ):
        init_observer(SMALL, other, jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"init_observer: `bias` must have .*\(2, 2, 16, 16\)"
    ):
        init_observer(SMALL, TEACHER, jax.random.key(0), bias=jnp.zeros((2, 2, 8, 8)))
    wide = dataclasses.replace(TEACHER, width=64)
    with pytest.raises(
        ValueError,
        match=r"observer_loss: `teacher` must have the observer's width 32; got 64",
    ):
        observer_loss(made[0], RWKV7(wide), teacher[1])


def test_weights_of_the_terms_are_checked(made, teacher):
    with pytest.raises(
        ValueError, match=r"observer_loss: `answers` must be at least 0; got -1"
    ):
        observer_loss(made[0], *teacher, answers=-1.0)
    with pytest.raises(
        ValueError, match="one of `variance`, `divergence`, `answers` must be above 0"
    ):
        observer_loss(made[0], *teacher, variance=0.0, divergence=0.0, answers=0.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"split": None}, r"`batch` must hold 'split'; it has tokens, mask"),
        (
            {"split": np.array([1, 2, 3], np.int32)},
            r"`batch\.split` must have shape \(4,\) to fit tokens",
        ),
        (
            {"split": np.array([1, 2, 3, 14], np.int32)},
            r".* between 0 and 13; got 14 in row 3",
        ),
        (
            {"mask": np.ones((ROWS, LENGTH + 1), np.float32)},
            r"`batch\.mask` must have shape",
        ),
        (
            {"tokens": np.full((ROWS, LENGTH + 1), 23, np.int32)},
            r"`batch\.tokens` must be .* below 23",
        ),
        (
            {"tokens": np.zeros((ROWS, 1), np.int32)},
            r"`batch\.mask` must have shape \(4, 0\) to fit tokens",
        ),
    ],
)
def test_a_malformed_batch_is_rejected(change, sentence, made, teacher, batch):
    batch = {name: part for name, part in (batch | change).items() if part is not None}
    with pytest.raises(ValueError, match=f"observer_loss: {sentence}"):
        observer_loss(made[0], *teacher)(made[1], batch)
    with pytest.raises(ValueError, match=f"handover: {sentence}"):
        evaluate_handover(*teacher, init_state(TEACHER), batch)


def test_malformed_calls_are_rejected(made, teacher, batch):
    observer, params = made
    tokens = batch["tokens"]
    with pytest.raises(
        ValueError, match=r"propose: `params` must hold bias, left, model, right"
    ):
        propose(observer, {"left": params["left"]}, tokens)
    with pytest.raises(
        ValueError, match=r"propose: `params\['left'\]` must have shape"
    ):
        propose(observer, params | {"left": params["left"][:1]}, tokens)
    with pytest.raises(
        ValueError, match=r"propose: `lengths` must lie between 0 and 14; got 15"
    ):
        propose(observer, params, tokens, np.array([1, 2, 15, 3]))
    with pytest.raises(
        ValueError, match="observer_loss: `batch` must have at least 2 rows"
    ):
        row = {name: part[:1] for name, part in batch.items()}
        observer_loss(observer, *teacher)(params, row)
    with pytest.raises(
        ValueError, match="proposal_error: `variance` must be given for one row"
    ):
        proposal_error(*made, *teacher, tokens[:1])
    with pytest.raises(
        ValueError, match=r"proposal_error: `variance` must .* \(2, 2\); got \(2, 3\)"
    ):
        proposal_error(*made, *teacher, tokens, variance=jnp.ones((2, 3)))
    with pytest.raises(
        ValueError, match=r"evaluate_handover: `state.att_shift` must have shape"
    ):
        evaluate_handover(*teacher, repeat(init_state(TEACHER), 3), batch)
    with pytest.raises(
        ValueError, match=r"add_prompt_splits: `least` and `most` must be in order"
    ):
        add_prompt_splits(batch, 0, 0, least=5, most=4)


def test_arguments_of_the_wrong_type_are_rejected(unchecked, made, batch):
    with pytest.raises(
        TypeError, match="Observer: `model` must be an RWKV7; got RWKV7Config"
    ):
        Observer(TEACHER, SMALL)
    with pytest.raises(
        TypeError, match="propose: `tokens` must be integers; got float32"
    ):
        propose(*made, jnp.zeros((1, 2)))
    with pytest.raises(
        TypeError, match="propose: `lengths` must be integers; got float32"
    ):
        propose(*made, batch["tokens"], jnp.zeros(ROWS))
