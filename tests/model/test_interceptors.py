"""Flax's `intercept_methods` around the model, as for steering: for its block, and no longer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import SMALLEST as CONFIG
from tiny_models import lively, tokens
from tolerances import SAME, assert_close

import rwkv7_jax as rwkv
from rwkv7_jax.generation import Decoder, DecodeState, make_options, prefill_state
from rwkv7_jax.observer import state_moments
from rwkv7_jax.test_time import RolloutSampler

MODEL = rwkv.RWKV7(CONFIG)
IDS = tokens(2, 5, CONFIG)
STATE = rwkv.init_state(CONFIG, 2)
START = DecodeState.create(
    rwkv.init_state(CONFIG), jnp.zeros((1, CONFIG.vocab_size), jnp.float32)
)


BATCH = {"tokens": np.asarray(IDS), "mask": np.ones((2, 4), np.float32)}


def train(loss):
    """Makes one step with the start state."""
    tx = optax.sgd(0.1)
    before = rwkv.TrainState.create(rwkv.init_state(CONFIG), tx)
    return rwkv.make_train_step(loss, tx)(before, BATCH)[1]["loss"]


def decoder():
    return Decoder(
        MODEL,
        lively(CONFIG),
        keys=jax.random.split(jax.random.key(0), 1),
        options=make_options(CONFIG.vocab_size),
        block=1,
    )


def forget_tokens(next_fun, args, kwargs, context):
    """Gives every token the same vector."""
    if context.module.name == "emb" and context.method_name == "__call__":
        return jnp.ones((*args[0].shape, CONFIG.width))
    return next_fun(*args, **kwargs)


@pytest.fixture(autouse=True, scope="module")
def weights_drawn_without_interceptors():
    """They are drawn once, and kept for all tests."""
    lively(CONFIG)


def logits():
    return MODEL.apply({"params": lively(CONFIG)}, IDS, STATE)[0]


def test_an_interceptor_counts_inside_of_its_block_and_not_after_it():
    with nn.intercept_methods(forget_tokens):
        first = logits()
    plain = logits()
    with nn.intercept_methods(forget_tokens):
        again = logits()
    compiled = jax.jit(logits)()
    np.testing.assert_array_equal(first, again)
    assert_close(plain, compiled, SAME["model"])
    assert float(jnp.abs(first - plain).max()) > 0.1
    # Without their tokens both rows are the same.
    np.testing.assert_array_equal(first[0], first[1])


def test_new_weights_of_an_interceptor_are_not_kept():
    def draw():
        return MODEL.init(jax.random.key(0), IDS, STATE)

    def names_only(next_fun, args, kwargs, context):
        seen.append(context.module.name)
        return next_fun(*args, **kwargs)

    seen = []
    draw()
    with nn.intercept_methods(names_only):
        draw()
    assert "emb" in seen


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (
            "generate",
            lambda: rwkv.generate(MODEL, lively(CONFIG), [1], tokens=1, temperature=0),
        ),
        (
            "prefill_state",
            lambda: prefill_state(MODEL, lively(CONFIG), np.array([1, 2])),
        ),
        (
            "RolloutSampler.draw",
            lambda: RolloutSampler(MODEL, lively(CONFIG), 1, 1, temperature=0).draw(
                None, [[1]], None
            ),
        ),
        (
            "state_moments",
            lambda: state_moments(MODEL, lively(CONFIG), IDS),
        ),
        ("Decoder", lambda: decoder().read(START, [[1]])),
        ("Decoder", lambda: decoder().decode(START, limit=1)),
        ("upscale", lambda: rwkv.upscale(MODEL, lively(CONFIG), IDS)),
        ("make_train_step", lambda: train(rwkv.state_loss(MODEL, lively(CONFIG)))),
        (
            "make_eval_step",
            lambda: rwkv.make_eval_step(rwkv.pretrain_loss(MODEL))(
                lively(CONFIG), BATCH
            ),
        ),
        (
            "token_nats",
            lambda: rwkv.evaluation.token_nats(
                MODEL, lively(CONFIG), rwkv.init_state(CONFIG), np.asarray(IDS)
            ),
        ),
    ],
)
def test_a_function_whose_program_is_kept_refuses_them(name, call):
    with (
        nn.intercept_methods(forget_tokens),
        pytest.raises(ValueError, match=f"^{name}: it must be called outside of flax"),
    ):
        call()


def test_an_interceptor_inside_a_loss_belongs_to_its_steps():
    plain = rwkv.state_loss(MODEL, lively(CONFIG))

    def steered(state, batch):
        with nn.intercept_methods(forget_tokens):
            return plain(state, batch)

    losses = [float(train(loss)) for loss in (plain, steered, plain)]
    assert losses[0] == losses[2]
    assert abs(losses[0] - losses[1]) > 1e-3
