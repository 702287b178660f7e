"""The losses compared with their plain forms, and the memory of the chunked one."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import QUICK, lively, tokens
from tolerances import SAME, assert_close, assert_trees_close

from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.training.head_loss import token_statistics
from rwkv7_jax.training.losses import (
    loss_weights,
    next_token_loss,
    pretrain_loss,
    shares_of_known_ids,
)

BATCH, LENGTH, WIDTH, VOCAB, CHUNK = 2, 21, 8, 37, 4
_NOISE = np.random.default_rng(0)
X, BASE = (
    jnp.asarray(_NOISE.normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32) for _ in "xb"
)
HEAD = jnp.asarray(_NOISE.normal(size=(VOCAB, WIDTH)), jnp.float32)
TARGETS = jnp.asarray(_NOISE.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)
WEIGHTS = jnp.asarray(_NOISE.uniform(size=(BATCH, LENGTH)), jnp.float32)

MODEL = RWKV7(QUICK)
IDS = tokens(2, 6)
MASK = jnp.array([[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]])


def plain(x, head):
    """Every logit at once."""
    logits = jnp.matmul(x, head.T, precision="highest")
    chosen = jnp.sum(
        jax.nn.one_hot(TARGETS, VOCAB) * jax.nn.log_softmax(logits), axis=-1
    )
    return -chosen, jnp.max(logits, axis=-1)


def chunked(x, head):
    """The package's, in eleven pieces of which the last is short."""
    found = token_statistics(x, head, TARGETS, chunk=CHUNK)
    return found.nats, found.largest


def total(function):
    """A weighted sum over both outputs."""

    def loss(x, head):
        nats, largest = function(x, head)
        return jnp.sum(WEIGHTS * (nats + jnp.square(largest)))

    return loss


def test_chunked_cross_entropy_matches_the_plain_one():
    for name, left, right in zip(
        ("nats", "largest"), jax.jit(chunked)(X, HEAD), plain(X, HEAD), strict=True
    ):
        assert_close(left, right, SAME["op"], name)


def test_gradients_of_chunked_cross_entropy_match_the_plain_ones():
    left, right = (
        jax.jit(jax.grad(total(f), argnums=(0, 1)))(X, HEAD) for f in (chunked, plain)
    )
    for name, actual, expected in zip(("x", "head"), left, right, strict=True):
        assert_close(actual, expected, SAME["op"], f"gradient of {name}")


def shapes_with_vocabulary(function):
    """Shapes in the compiled gradient that have a vocabulary axis, the head's aside."""
    compiled = (
        jax.jit(jax.grad(total(function), argnums=(0, 1))).lower(X, HEAD).compile()
    )
    found = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    shapes = {tuple(map(int, shape.split(","))) for shape in found}
    return {shape for shape in shapes if VOCAB in shape and WIDTH not in shape}


def test_no_program_holds_the_logits_of_all_tokens():
    largest = max(np.prod(s) for s in shapes_with_vocabulary(chunked))
    assert largest == CHUNK * VOCAB
    assert (
        max(np.prod(s) for s in shapes_with_vocabulary(plain)) == BATCH * LENGTH * VOCAB
    )


def divergence(x, base, **changes):
    """The package's divergence between the model and a reference with the same head."""
    return token_statistics(x, HEAD, None, reference=base, chunk=CHUNK, **changes)


def test_divergence_is_the_kl_divergence_of_the_two_distributions():
    p, q = (np.asarray(jax.nn.softmax(x @ HEAD.T), np.float64) for x in (BASE, X))
    found = jax.jit(divergence)(X, BASE)
    assert found.nats is None and found.correct is None
    assert_close(found.kl, np.sum(p * np.log(p / q), axis=-1), SAME["model"])
    assert_close(jax.jit(divergence)(X, X).kl, np.zeros((BATCH, LENGTH)), SAME["op"])


def test_the_reverse_divergence_swaps_the_two_distributions():
    forward = jax.jit(divergence)(X, BASE).kl
    reverse = jax.jit(lambda x, base: divergence(base, x, reverse_kl=True))(X, BASE).kl
    assert_close(reverse, forward, SAME["op"])
    assert (
        float(jnp.max(jnp.abs(divergence(X, BASE, reverse_kl=True).kl - forward)))
        > 0.01
    )


def test_the_temperature_applies_to_the_targets_only():
    logits = X @ HEAD.T
    found = jax.jit(
        lambda t: token_statistics(
            X, HEAD, TARGETS, reference=BASE, temperature=t, chunk=CHUNK
        )
    )(0.5)
    scaled = jax.nn.log_softmax(logits / 0.5)
    nats = -jnp.take_along_axis(scaled, TARGETS[..., None], -1)[..., 0]
    assert_close(found.nats, nats, SAME["model"])
    assert_close(found.largest, jnp.max(logits, axis=-1), SAME["model"])
    assert_close(found.kl, divergence(X, BASE).kl, SAME["model"])


def test_a_target_is_correct_where_its_logit_is_the_largest():
    best = jnp.argmax(X @ HEAD.T, axis=-1)
    mixed = jnp.where(jnp.arange(LENGTH) % 2 == 0, best, TARGETS).astype(jnp.int32)
    found = jax.jit(lambda ids: token_statistics(X, HEAD, ids, chunk=CHUNK).correct)(
        mixed
    )
    np.testing.assert_array_equal(found, mixed == best)
    assert found.dtype == jnp.bool_


def test_weights_are_the_normalized_mask_unless_the_batch_has_its_own():
    batch = {"tokens": IDS, "mask": MASK}
    assert_close(loss_weights(batch), np.asarray(MASK) / 4, SAME["op"])
    # A mask of fractions may sum to less than 1.
    fractions = batch | {"mask": 0.125 * MASK}
    assert_close(loss_weights(fractions), np.asarray(MASK) / 4, SAME["op"])
    own = jnp.full((2, 5), 0.25)
    np.testing.assert_array_equal(loss_weights(batch | {"weights": own}), own)
    np.testing.assert_array_equal(
        loss_weights(batch | {"mask": 0 * MASK}), np.zeros((2, 5))
    )


def test_a_target_that_is_no_id_has_no_share():
    shares = shares_of_known_ids(jnp.ones((1, 2)), np.array([[1, 2, 9]]), 9)
    np.testing.assert_array_equal(shares, [[1, np.nan]])


@functools.partial(jax.jit, static_argnums=2)
def losses(params, mask, l2wrap):
    """Loss and metrics of the tiny model."""
    batch = {"tokens": IDS, "mask": mask}
    return next_token_loss(MODEL, params, init_state(QUICK, 2), batch, l2wrap=l2wrap)


def test_masked_targets_do_not_count():
    loss, metrics = losses(lively(QUICK), MASK, 0.0)
    logits, _ = jax.jit(MODEL.apply)(
        {"params": lively(QUICK)}, IDS[:, :-1], init_state(QUICK, 2)
    )
    nats = -np.take_along_axis(
        jax.nn.log_softmax(logits), np.asarray(IDS)[:, 1:, None], -1
    )[..., 0]
    expected = np.sum(nats * np.asarray(MASK)) / 4
    assert_close(loss, expected, SAME["model"], "loss")
    assert_close(metrics["loss_nats"], expected, SAME["model"], "loss_nats")


def test_l2wrap_pulls_the_largest_logits_and_is_not_in_the_reported_loss():
    """Its gradient on the logits is factor / (B T) times the largest logit, at that logit alone."""
    factor = 0.3
    gradient = jax.jit(jax.grad(losses, has_aux=True), static_argnums=2)
    (with_, metrics), (without, _) = (
        gradient(lively(QUICK), MASK, x) for x in (factor, 0.0)
    )
    assert_close(
        metrics["loss_nats"], losses(lively(QUICK), MASK, 0.0)[0], SAME["model"]
    )
    state = init_state(QUICK, 2)
    apply = jax.jit(lambda p: MODEL.apply({"params": p}, IDS[:, :-1], state)[0])
    logits, pull = jax.vjp(apply, lively(QUICK))
    top = jax.nn.one_hot(jnp.argmax(logits, axis=-1), QUICK.vocab_size)
    (expected,) = pull(factor / (2 * 5) * top * logits)
    difference = jax.tree.map(jnp.subtract, with_, without)
    assert_trees_close(difference, expected, SAME["gradient"])


def test_bfloat16_activations_give_a_float32_loss():
    model = RWKV7(dataclasses.replace(QUICK, dtype="bfloat16"))
    batch = {"tokens": IDS, "mask": MASK}
    state = init_state(model.config, 2)
    loss, _ = jax.jit(lambda params: next_token_loss(model, params, state, batch))(
        lively(QUICK)
    )
    assert loss.dtype == jnp.float32
    assert_close(loss, losses(lively(QUICK), MASK, 0.0)[0], 3e-2)


def test_the_weight_of_l2wrap_may_be_traced(unchecked):
    params = lively(QUICK)
    batch = {"tokens": IDS, "mask": MASK}

    @jax.jit
    def loss(pull):
        return pretrain_loss(MODEL, l2wrap=pull)(params, batch)[0]

    for pull in (0.0, 1e-2):
        alone = jax.jit(pretrain_loss(MODEL, l2wrap=pull))(params, batch)[0]
        assert_close(loss(pull), alone, SAME["model"])
