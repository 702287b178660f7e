"""Steps that Ctrl-C ends, as in a notebook, and what was donated to steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import TINIEST, lively, random_state, tokens

import rwkv7_jax as rwkv
from rwkv7_jax.training.stacked_step import create_stack, make_stacked_step

MODEL = rwkv.RWKV7(TINIEST)
TX = optax.adam(0.1)
RATES = np.array([0.1, 0.2])
BATCH = {"tokens": tokens(2, 5, TINIEST), "mask": np.ones((2, 4), np.float32)}
DONATED = "must not hold deleted arrays; they were donated to an earlier call"


@jax.tree_util.register_pytree_node_class
class Interrupted:
    """A parameter during whose way out of a compiled program Ctrl-C may arrive."""

    armed = False

    def __init__(self, value):
        self.value = value

    def tree_flatten(self):
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        if cls.armed:
            raise KeyboardInterrupt
        return cls(*leaves)


def squared(params, batch):
    return jnp.sum(batch["mask"]) * jnp.sum(jnp.square(params.value))


def interrupt(monkeypatch, step, train):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Interrupted, "armed", True)
        step(train, BATCH)


def assert_same(first, second):
    jax.tree.map(
        np.testing.assert_array_equal, jax.tree.leaves(first), jax.tree.leaves(second)
    )


def test_an_interrupted_step_can_be_repeated(monkeypatch):
    step = rwkv.make_train_step(squared, TX, donate=False)
    train = rwkv.TrainState.create(Interrupted(jnp.ones(3)), TX)
    expected = step(train, BATCH)
    interrupt(monkeypatch, step, train)
    assert_same(step(train, BATCH), expected)


def test_an_interrupted_step_of_a_stack_can_be_repeated(monkeypatch):
    step = make_stacked_step(squared, TX, RATES, donate=False)
    train = create_stack(Interrupted(jnp.ones((2, 3))), TX)
    expected = step(train, BATCH)
    interrupt(monkeypatch, step, train)
    assert_same(step(train, BATCH), expected)


def test_a_donated_argument_is_rejected_in_one_sentence(monkeypatch):
    step = rwkv.make_train_step(squared, TX)
    train = rwkv.TrainState.create(Interrupted(jnp.ones(3)), TX)
    train, _ = step(train, BATCH)
    interrupt(monkeypatch, step, train)
    for call in (step, step.lower, step.trace):
        with pytest.raises(ValueError, match=f"^make_train_step: `train` {DONATED}"):
            call(train, BATCH)
    with pytest.raises(ValueError, match=f"^TrainState.create: `params` {DONATED}"):
        rwkv.TrainState.create(train.params, TX)


def test_a_donated_stack_is_rejected():
    step = make_stacked_step(squared, TX, RATES)
    train = create_stack(Interrupted(jnp.ones((2, 3))), TX)
    step(train, BATCH)
    with pytest.raises(ValueError, match=f"^make_stacked_step: `train` {DONATED}"):
        step(train, BATCH)


def test_a_donated_state_is_rejected_by_every_function(tmp_path):
    params = lively(TINIEST)
    state = random_state(TINIEST, 1)
    jax.tree.map(lambda leaf: leaf.delete(), state)
    with pytest.raises(ValueError, match=f"^generate: `state` {DONATED}"):
        rwkv.generate(MODEL, params, [1], state, tokens=1, temperature=0)
    with pytest.raises(ValueError, match=f"^check_state: `state` {DONATED}"):
        rwkv.check_state(state, 1, TINIEST)
    with pytest.raises(ValueError, match=f"^save_state: `state` {DONATED}"):
        rwkv.save_state(tmp_path / "state.pth", state)
    evaluate = rwkv.make_eval_step(rwkv.state_loss(MODEL, params))
    with pytest.raises(ValueError, match=f"^make_eval_step: `params` {DONATED}"):
        evaluate(state, BATCH)
