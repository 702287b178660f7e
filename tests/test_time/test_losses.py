"""The losses of test-time training, restated in NumPy in float64.

Gradients are compared with finite differences of these restatements.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_checkpoints import random_params
from scipy.special import log_softmax
from tiny_models import lively, random_state, restated
from tolerances import SAME, assert_close

from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.test_time.losses import (
    context_distillation,
    distillation_loss,
    policy_loss,
)
from rwkv7_jax.training.losses import loss_weights
from rwkv7_jax.training.train_step import TrainState, make_train_step

SIZES = {
    "vocab_size": 13,
    "head_size": 16,
    "decay_rank": 8,
    "icl_rank": 6,
    "value_rank": 5,
}
SIZES |= {"implementation": "scan"}
CONFIG = RWKV7Config(num_layers=2, width=32, **SIZES)
LARGE = RWKV7Config(num_layers=3, width=48, **SIZES)
MODEL = RWKV7(CONFIG)
REFERENCE = random_state(CONFIG, seed=7)


@pytest.fixture(scope="module")
def params():
    return lively(CONFIG)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    mask = np.array(
        [[0, 1, 1, 1, 0], [0, 0, 0.5, 0.5, 0.5], [1, 0, 0, 0, 0]], np.float32
    )
    tokens = rng.integers(0, CONFIG.vocab_size, (3, 6)).astype(np.int32)
    return {
        "tokens": tokens,
        "mask": mask,
        "advantages": np.array([1.5, -0.5, 0.25], np.float32),
    }


def logps(params, state, batch, temperature=1.0, config=CONFIG):
    rows = [restated(params, ids[:-1], state, config)[0] for ids in batch["tokens"]]
    return log_softmax(np.stack(rows) / temperature, axis=-1)


def chosen(logp, batch):
    return np.take_along_axis(logp, batch["tokens"][:, 1:, None], axis=-1)[..., 0]


def shares(batch):
    return batch["mask"] / batch["mask"].sum()


def divergence(first, second):
    return (np.exp(first) * (first - second)).sum(-1)


def assert_value_and_gradient(gradient, restated_loss, batch):
    state = random_state(CONFIG, seed=3)
    step = 1e-5
    (value, metrics), grads = gradient(state, batch)
    assert_close(value, restated_loss(state), SAME["model"], "value")
    direction = np.random.default_rng(5).normal(size=state.wkv.shape)
    wkv = np.asarray(state.wkv, np.float64)
    ends = [
        restated_loss(state.replace(wkv=wkv + s * direction)) for s in (step, -step)
    ]
    difference = (ends[0] - ends[1]) / (2 * step)
    product = np.vdot(np.asarray(grads.wkv, np.float64), direction)
    np.testing.assert_allclose(product, difference, rtol=1e-3)
    assert not np.any(grads.att_shift) and not np.any(grads.ffn_shift)
    return metrics


@pytest.fixture(scope="module")
def gradient(params):
    """The gradient of the policy loss with all its terms."""
    loss = policy_loss(MODEL, params, temperature=0.7, kl=0.3, reference=REFERENCE)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_the_policy_loss_is_reinforce_with_an_exact_kl(params, gradient, batch):
    base = logps(params, REFERENCE, batch)

    def by_hand(state):
        reinforce = batch["advantages"][:, None] * chosen(
            logps(params, state, batch, 0.7), batch
        )
        apart = divergence(logps(params, state, batch), base)
        return np.sum(shares(batch) * (0.3 * apart - reinforce))

    metrics = assert_value_and_gradient(gradient, by_hand, batch)
    assert {"policy_loss", "loss_nats", "kl_nats", "state_max", "state_rms"} <= set(
        metrics
    )


def test_kl_and_its_gradient_are_zero_at_the_reference(gradient, batch):
    still = batch | {"advantages": np.zeros(3, np.float32)}
    (value, metrics), grads = gradient(REFERENCE, still)
    assert abs(float(value)) < 1e-6 and abs(float(metrics["kl_nats"])) < 1e-6
    assert float(jnp.abs(grads.wkv).max()) < 1e-6
    away = gradient(random_state(CONFIG), still)[0][1]
    assert float(away["kl_nats"]) > 1e-3


@pytest.fixture(scope="module")
def reinforce(params):
    """Return the gradient of the policy loss without a KL term."""
    return jax.jit(jax.value_and_grad(policy_loss(MODEL, params), has_aux=True))


def test_zero_advantages_and_no_kl_give_a_zero_gradient(reinforce, batch):
    batch = batch | {"weights": np.asarray(loss_weights(batch))}
    _, grads = reinforce(
        random_state(CONFIG), batch | {"advantages": np.zeros(3, np.float32)}
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_microbatches_add_up_to_the_full_policy_batch(reinforce, batch):
    state = random_state(CONFIG)
    weights = np.asarray(loss_weights(batch))
    (whole, _), grads = reinforce(state, batch | {"weights": weights})
    # Weights are shares of the whole batch, zero for the other pieces.
    pieces = [weights * (np.arange(3) == row)[:, None] for row in range(3)]
    parts = [reinforce(state, batch | {"weights": piece}) for piece in pieces]
    assert_close(
        sum(value for (value, _), _ in parts), whole, SAME["micro-batches"], "value"
    )
    assert_close(sum(g.wkv for _, g in parts), grads.wkv, SAME["gradient"], "gradient")


def test_the_distillation_loss_is_cross_entropy_plus_teacher_kl(params, batch):
    teacher = random_params(LARGE, dtype=jnp.float32, scale=0.3)
    start = random_state(LARGE, seed=8)
    others = {
        "teacher": RWKV7(LARGE),
        "teacher_params": teacher,
        "teacher_state": start,
    }
    loss = distillation_loss(MODEL, params, imitation=0.5, kl=2.0, **others)
    wanted = logps(teacher, start, batch, config=LARGE)

    def by_hand(state):
        logp = logps(params, state, batch)
        nats = -chosen(logp, batch)
        apart = divergence(wanted, logp)
        return np.sum(shares(batch) * (0.5 * nats + 2.0 * apart))

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    metrics = assert_value_and_gradient(gradient, by_hand, batch)
    assert {"loss_nats", "kl_nats", "state_max", "state_rms"} <= set(metrics)


@pytest.mark.slow
def test_the_anchor_is_the_kl_from_the_base_on_separate_text(params, batch):
    text = {"tokens": batch["tokens"][::-1]}
    batch = batch | {"anchor": text["tokens"]}
    base = logps(params, init_state(CONFIG), text)
    rest = {
        distillation_loss: lambda logp: -chosen(logp, batch),
        policy_loss: lambda logp: -batch["advantages"][:, None] * chosen(logp, batch),
    }
    for make, per_token in rest.items():

        def by_hand(state, per_token=per_token):
            own = np.sum(shares(batch) * per_token(logps(params, state, batch)))
            return own + 0.25 * divergence(base, logps(params, state, text)).mean()

        loss = make(MODEL, params, anchor=0.25)
        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        assert "anchor_nats" in assert_value_and_gradient(gradient, by_hand, batch)


@pytest.mark.slow
def test_context_distillation_turns_a_prompt_into_a_state(params):
    context = generate(MODEL, params, [7, 3, 9, 9, 1, 12, 4, 2], tokens=0).state
    before = jax.tree.map(np.array, params)
    tx = optax.adam(0.1, b2=0.99)
    step = make_train_step(context_distillation(MODEL, params, context), tx)
    train = TrainState.create(init_state(CONFIG), tx)
    found = []
    for seed in range(60):
        tokens = np.random.default_rng(seed).integers(0, 13, (8, 9)).astype(np.int32)
        batch = {"tokens": tokens, "mask": np.ones((8, 8), np.float32)}
        train, metrics = step(train, batch)
        found.append(float(metrics["kl_nats"]))
    print(
        f"KL to the model after the prompt: {found[0]:.3g} -> {np.mean(found[-5:]):.3g}"
    )
    assert np.mean(found[-5:]) < 0.25 * found[0]
    jax.tree.map(np.testing.assert_array_equal, before, params)


def test_invalid_loss_arguments_are_rejected(params):
    other = RWKV7(RWKV7Config(vocab_size=20, num_layers=2, width=32, head_size=16))
    both = {"teacher": MODEL, "teacher_params": params}
    for change, message in [
        (
            {"teacher": other, "teacher_params": params},
            "`teacher` must have the student's vocabulary size, 13; got 20",
        ),
        ({"teacher": MODEL}, ".*`teacher_params` is None"),
        ({"teacher_params": params}, ".*`teacher` is None"),
        (
            {"teacher_state": init_state(CONFIG)},
            "`teacher_state` must be None without a `teacher`",
        ),
        (
            both | {"teacher_state": init_state(CONFIG, 2)},
            "`teacher_state`: .* must have shape",
        ),
        ({"leaves": ("kv",)}, "`leaves` must be among .*; got 'kv'"),
        ({"kl": -1.0}, "`kl` must be at least 0; got -1"),
    ]:
        with pytest.raises(ValueError, match=f"distillation_loss: {message}"):
            distillation_loss(MODEL, params, **change)
    for change, message in [
        ({"temperature": 0}, "`temperature` must be above 0"),
        ({"kl": float("nan")}, "`kl` must be at least 0; got nan"),
        ({"reference": init_state(LARGE)}, "`reference`: .* must have shape"),
        ({"leaves": ("kv",)}, "`leaves` must be among"),
    ]:
        with pytest.raises(ValueError, match=f"policy_loss: {message}"):
            policy_loss(MODEL, params, **change)
