"""Tuning a start state: which arrays move, their gradients, and DBP's statistics."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerances import FORMULA, SAME, assert_close

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state, repeat
from rwkv7_jax.training.losses import next_token_loss, pretrain_loss
from rwkv7_jax.training.train_step import TrainState, make_train_step
from rwkv7_jax.tuning.read_statistics import (
    initial_state_read_vectors,
    memory_read_vectors,
    second_moment,
    state_decorrelator,
    state_statistics,
)
from rwkv7_jax.tuning.state_arithmetic import scaled
from rwkv7_jax.tuning.state_tuning import state_loss, trainable_mask
from rwkv7_jax.tuning.upscaling import upscale

# Sizes that no activation shares, so that a weight's gradient can be recognised by its shape.
SIZES = {
    "vocab_size": 75,
    "num_layers": 3,
    "width": 48,
    "head_size": 16,
    "ffn_width": 136,
}
CONFIG = RWKV7Config(**SIZES, implementation="scan")
# A gradient through one layer compiles three times as fast as through layers that are scanned.
SHALLOW = dataclasses.replace(CONFIG, num_layers=1)
ROWS, TOKENS = 2, 21
sizes = pytest.mark.parametrize(
    "config",
    [SHALLOW, pytest.param(CONFIG, marks=pytest.mark.slow)],
    ids=["shallow", "deep"],
)


def perturbed(tree, seed: int, size: float):
    leaves, form = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draws = [
        x + size * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(form, draws)


@functools.cache
def weights(config):
    tokens = jnp.zeros((1, 1), jnp.int32)
    start = init_state(config)
    init = jax.jit(lambda key: RWKV7(config).init(key, tokens, start)["params"])
    return perturbed(init(jax.random.key(0)), 1, 0.1)


@pytest.fixture(scope="module")
def shallow():
    """A model of one layer and its weights."""
    return RWKV7(SHALLOW), weights(SHALLOW)


def rows():
    tokens = np.random.default_rng(2).integers(0, CONFIG.vocab_size, (ROWS, TOKENS + 1))
    return {
        "tokens": tokens.astype(np.int32),
        "mask": np.ones((ROWS, TOKENS), np.float32),
    }


@pytest.fixture(scope="module")
def batch():
    return rows()


TX = optax.adam(0.1)


@pytest.fixture(scope="module")
def step(shallow):
    return make_train_step(state_loss(*shallow), TX)


@pytest.fixture(scope="module")
def tuned(step, batch):
    """Two steps of tuning, with the metrics of the second."""
    train = TrainState.create(init_state(SHALLOW), TX)
    train, _ = step(train, batch)
    return step(train, batch)


def test_only_the_wkv_state_is_tuned(tuned):
    train, _ = tuned
    assert float(jnp.abs(train.params.wkv).max()) > 0.05
    assert float(jnp.abs(train.params.att_shift).max()) == 0.0
    assert float(jnp.abs(train.params.ffn_shift).max()) == 0.0


def test_the_shift_states_can_be_tuned(shallow, batch):
    loss = state_loss(*shallow, leaves=("wkv", "att_shift", "ffn_shift"))
    grads = jax.jit(jax.grad(lambda s: loss(s, batch)[0]))(init_state(SHALLOW))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))


def test_tuning_changes_no_bit_of_the_weights(step, shallow, batch):
    before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), shallow[1])
    step(TrainState.create(init_state(SHALLOW), TX), batch)
    jax.tree.map(np.testing.assert_array_equal, before, shallow[1])


def test_the_loss_falls(shallow, batch, tuned):
    _, metrics = tuned
    base, _ = jax.jit(state_loss(*shallow))(init_state(SHALLOW), batch)
    assert float(metrics["loss_nats"]) < float(base)


@sizes
def test_the_gradient_of_a_state_matches_finite_differences(config, batch):
    loss = state_loss(RWKV7(config), weights(config))
    start = perturbed(init_state(config), 3, 0.3)
    value = jax.jit(lambda s: loss(s, batch)[0])
    grads = jax.jit(jax.grad(lambda s: loss(s, batch)[0]))(start)
    direction = perturbed(jax.tree.map(jnp.zeros_like, start), 4, 1.0)
    direction = init_state(config).replace(wkv=direction.wkv)
    move = lambda size: jax.tree.map(lambda x, d: x + size * d, start, direction)  # noqa: E731
    difference = (float(value(move(1e-2))) - float(value(move(-1e-2)))) / 2e-2
    product = float(jnp.vdot(grads.wkv, direction.wkv))
    assert product == pytest.approx(difference, rel=1e-2)


def test_the_gradient_is_the_sum_over_rows(shallow, batch):
    loss = state_loss(*shallow)
    whole = jax.jit(jax.grad(lambda s: loss(s, batch)[0]))(init_state(SHALLOW)).wkv
    start = repeat(init_state(SHALLOW), ROWS)
    by_row = jax.jit(jax.grad(lambda s: next_token_loss(*shallow, s, batch)[0]))(
        start
    ).wkv
    np.testing.assert_allclose(
        by_row.sum(1, keepdims=True), whole, rtol=1e-4, atol=1e-8
    )


def test_the_anchor_is_the_mean_divergence_of_the_tuned_logits_from_the_base(
    shallow, batch
):
    model, params = shallow
    anchor = batch["tokens"][:, ::-1]
    batch = batch | {"anchor": anchor}
    base = init_state(SHALLOW)
    away = perturbed(base, 5, 0.5)
    loss = jax.jit(state_loss(model, params, anchor=1.0))

    @jax.jit
    def logits(state):
        return model.apply({"params": params}, anchor[:, :-1], repeat(state, ROWS))[0]

    def log_probabilities(state):
        scores = np.asarray(logits(state), np.float64)
        return scores - np.log(np.sum(np.exp(scores), -1, keepdims=True))

    reference = log_probabilities(base)
    gaps = reference - log_probabilities(away)
    expected = np.mean(np.sum(np.exp(reference) * gaps, -1))
    assert expected > 1e-3
    _, metrics = loss(away, batch)
    assert_close(metrics["anchor_nats"], expected, SAME["model"])
    wkv = np.asarray(away.wkv, np.float64)
    assert_close(metrics["state_rms"], np.sqrt(np.mean(wkv**2)), FORMULA)
    assert_close(metrics["state_max"], np.abs(wkv).max(), FORMULA)
    # The entry of largest size is negative here or there.
    assert_close(
        loss(scaled(away, -1), batch)[1]["state_max"], np.abs(wkv).max(), FORMULA
    )
    assert abs(float(loss(base, batch)[1]["anchor_nats"])) < 1e-6
    # A compiled loss cannot check its ids.
    unknown = np.where(np.arange(TOKENS + 1) == 9, SHALLOW.vocab_size, anchor)
    _, metrics = loss(away, batch | {"anchor": unknown})
    assert np.isnan(metrics["anchor_nats"]) and np.isfinite(metrics["loss_nats"])


def compiled_text(loss, trainables, batch) -> tuple[str, int]:
    """The optimised program of a training step, and its temporary bytes."""
    tx = optax.adam(0.1)
    step = make_train_step(loss, tx)
    train = TrainState.create(trainables, tx)
    compiled = step.lower(train, batch).compile()
    return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


@functools.cache
def program(config):
    """The compiled step of state tuning, as `compiled_text` gives it."""
    loss = state_loss(RWKV7(config), weights(config))
    return compiled_text(loss, init_state(config), rows())


def makes_weight_shapes(text: str) -> list[str]:
    """Matrix products of the program whose result has the shape of a feed-forward weight."""
    shapes = r"f32\[(?:\d+,)?(?:136,48|48,136)\]"
    return re.findall(rf"= {shapes}\S* dot\(", text)


@sizes
def test_the_compiled_step_holds_no_weight_gradient(config):
    text, temp = program(config)
    params = weights(config)
    control, control_temp = compiled_text(pretrain_loss(RWKV7(config)), params, rows())
    assert makes_weight_shapes(control), (
        "the control program must make weight gradients"
    )
    assert not makes_weight_shapes(text)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert control_temp - temp > 0.5 * size


def test_moments_exist_for_the_state_only():
    tx = optax.adam(0.1)
    train = TrainState.create(init_state(CONFIG), tx)
    shapes = {leaf.shape for leaf in jax.tree.leaves(train.opt_state)}
    assert shapes <= {(), *(leaf.shape for leaf in jax.tree.leaves(init_state(CONFIG)))}


@sizes
def test_weights_are_arguments_of_the_compiled_step_not_constants(config):
    text, _ = program(config)
    assert not re.search(r"f32\[(?:\d+,)?136,48\]\S* constant\(", text)


def test_a_state_scales_between_base_and_tuned():
    state = perturbed(init_state(CONFIG), 6, 1.0)
    np.testing.assert_array_equal(scaled(state, 0.25).wkv, 0.25 * state.wkv)


def test_an_unknown_leaf_is_rejected(shallow):
    with pytest.raises(
        ValueError, match=r"state_loss: `leaves` must be among wkv, .*; got 'kv'"
    ):
        state_loss(*shallow, leaves=("kv",))


def test_a_state_survives_tree_transformations():
    shapes = jax.eval_shape(lambda: init_state(CONFIG, 2))
    assert isinstance(shapes, RWKV7State)


@functools.cache
def widened(config):
    """An upscaled state, M of a head apart from N."""
    return upscale(RWKV7(config), weights(config), rows()["tokens"], size=20)


def test_tuning_a_memory_moves_only_the_memory(shallow, batch):
    wide = widened(SHALLOW)
    tx = optax.masked(optax.adam(0.1), trainable_mask(wide, ("memory",)))
    step = make_train_step(state_loss(*shallow, leaves=("memory",)), tx)
    train, first = step(TrainState.create(wide, tx), batch)
    train, second = step(train, batch)
    assert float(second["loss_nats"]) < float(first["loss_nats"])
    assert float(jnp.abs(train.params.upscaled.memory).max()) > 0.05
    rest = train.params.replace(upscaled=train.params.upscaled.replace(memory=None))
    before = wide.replace(upscaled=wide.upscaled.replace(memory=None))
    jax.tree.map(np.testing.assert_array_equal, rest, before)


@sizes
def test_the_gradient_of_a_memory_matches_finite_differences(config, batch):
    wide = widened(config)
    loss = state_loss(RWKV7(config), weights(config), leaves=("memory",))
    start = perturbed(wide.upscaled.memory, 3, 0.3)
    direction = perturbed(jnp.zeros_like(start), 4, 1.0)

    @jax.jit
    def value(memory):
        return loss(wide.replace(upscaled=wide.upscaled.replace(memory=memory)), batch)[
            0
        ]

    up = float(value(start + 1e-2 * direction))
    down = float(value(start - 1e-2 * direction))
    product = float(jnp.vdot(jax.jit(jax.grad(value))(start), direction))
    assert product == pytest.approx((up - down) / 2e-2, rel=1e-2)


@functools.cache
def traced(config):
    """What the layers did with the first row."""
    read = jax.jit(functools.partial(RWKV7(config).apply, method="trace"))
    ids = rows()["tokens"][:1, :-1]
    *_, trace = read({"params": weights(config)}, ids, repeat(widened(config), 1))
    return trace


@sizes
@pytest.mark.parametrize("leaf", ["wkv", "memory"])
def test_statistics_are_the_second_moments_of_the_read_vectors(batch, leaf, config):
    """In the last layer the logits' input is linear in the memory; the moments are restated."""
    wide = widened(config)
    model = RWKV7(config)
    statistics = state_statistics(model, weights(config), leaves=(leaf,), rows=1)
    found = jax.jit(statistics)(wide, batch)
    parts = {name: part[-1] for name, part in traced(config).items()}
    if leaf == "wkv":
        psi = initial_state_read_vectors(parts)
        moments = found.wkv
        assert found.upscaled.memory is None
    else:
        last = jax.tree.map(lambda x: x[-1], wide.upscaled)
        psi = memory_read_vectors(last, parts)
        moments = found.upscaled.memory
        assert found.wkv is None
    psi = np.asarray(psi, np.float64)[0]
    np.testing.assert_allclose(
        moments[-1, 0],
        np.einsum("thm,thn->hmn", psi, psi) / TOKENS,
        rtol=1e-4,
        atol=1e-5,
    )


def test_targets_with_negative_weights_count_in_statistics():
    """As those of rewards below the mean: a moment with negative eigenvalues has no whitener."""
    psi = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
    weights = jax.random.normal(jax.random.key(1), (2, 5))
    signed = second_moment(psi, weights)
    np.testing.assert_array_equal(signed, second_moment(psi, jnp.abs(weights)))
    assert np.linalg.eigvalsh(np.asarray(signed)).min() > 0


@pytest.mark.parametrize("scale", [1e-12, 1e-30, 1e6])
def test_statistics_do_not_depend_on_the_scale_of_the_weights(scale):
    psi = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
    weights = jax.random.uniform(jax.random.key(1), (2, 5))
    found = second_moment(psi, scale * weights)
    np.testing.assert_allclose(found, second_moment(psi, weights), rtol=1e-5)
    assert not np.any(second_moment(psi, 0 * weights))


def test_tuning_an_absent_memory_is_rejected(shallow, batch):
    loss = state_loss(*shallow, leaves=("memory",))
    with pytest.raises(
        ValueError,
        match="`leaves` must not hold memory, because the state is not upscaled",
    ):
        loss(init_state(SHALLOW), batch)


def test_an_upscaled_state_is_not_tuned_without_its_memory(shallow, batch):
    with pytest.raises(
        ValueError, match=r"state_loss: `leaves` must hold memory.* got \('wkv',\)"
    ):
        state_loss(*shallow)(widened(SHALLOW), batch)


@pytest.mark.parametrize(
    ("leaves", "method", "decorrelated"),
    [
        (("wkv",), "none", False),
        (("wkv",), "dbp", True),
        (("wkv", "att_shift", "ffn_shift"), "whiten", True),
        (("memory",), "none", False),
        (("memory",), "dbp", True),
        # Whitened by its features already.
        (("memory",), "whiten", False),
    ],
)
def test_an_optimizer_has_whiteners_iff_it_receives_statistics(
    shallow, leaves, method, decorrelated
):
    start = widened(SHALLOW) if "memory" in leaves else init_state(SHALLOW)
    decorrelator = state_decorrelator(
        *shallow, start, leaves=leaves, method=method, rate=0.1
    )
    tx = decorrelator.wrap(optax.adam(0.1))
    state = jax.eval_shape(tx.init, start)
    whiteners = []
    for _, tree in optax.tree.get_all_with_path(state, "whitener"):
        whiteners += jax.tree.leaves(tree)
    assert (decorrelator.statistics is not None) == decorrelated
    # One for the memory or the WKV state; shifts and writes have none.
    assert len(whiteners) == int(decorrelated)


def test_an_unknown_decorrelation_method_is_rejected(shallow):
    sentence = (
        "state_decorrelator: `method` must be one of none, dbp, whiten; got 'exact'"
    )
    with pytest.raises(ValueError, match=sentence):
        state_decorrelator(*shallow, init_state(SHALLOW), method="exact")
