"""Inside compiled programs, where values are not known: nothing is selected rather than another.

Ids, indices, lengths and splits out of range, batches in which nothing counts, and updates that are
not finite. What can be read on the host is refused there; see `test_misuse.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from misuse_values import CONFIG, IDS, MASK, MODEL

import pallas_kernels as kernels
import rwkv7_jax as rwkv
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.observer.prompt_splits import continuations
from rwkv7_jax.test_time.losses import distillation_loss, policy_loss
from rwkv7_jax.training.head_loss import token_statistics
from rwkv7_jax.training.projection_statistics import weight_decorrelator
from rwkv7_jax.tuning.read_statistics import state_decorrelator

NOISE = np.random.default_rng(0)
OUTSIDE = [-1, -257, 257, 2**30, -(2**31)]


def draw(shape):
    return jnp.asarray(0.2 * NOISE.normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def params():
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(
        MODEL.init, jax.random.key(0), tokens, rwkv.init_state(CONFIG)
    )
    return jax.tree.map(lambda leaf: draw(leaf.shape), shapes["params"])


@pytest.fixture(scope="module")
def three():
    shapes = rwkv.init_state(CONFIG, 3)
    return jax.tree.map(lambda leaf: draw(leaf.shape), shapes)


run = jax.jit(
    lambda params, tokens, state, lengths=None: MODEL.apply(
        {"params": params}, tokens, state, lengths
    )
)


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_traced_id_out_of_range_embeds_as_zeros(params, three, outside):
    state = rwkv.select(three, [0, 1])
    found = run(params, jnp.asarray(IDS).at[1, 2].set(outside), state)
    # An id of the vocabulary whose row is zero is what it must equal.
    empty = jax.tree.map(lambda leaf: leaf, params)
    empty["emb"] = {"weight": params["emb"]["weight"].at[99].set(0.0)}
    expected = run(empty, jnp.asarray(IDS).at[1, 2].set(99), state)
    assert_same(found, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("lengths", "meant"),
    [
        ([-1, 3], [0, 3]),
        ([-(2**31), 5], [0, 5]),
        ([6, 2], [5, 2]),
        ([2**31 - 1, 0], [5, 0]),
    ],
)
def test_traced_lengths_are_clipped_to_the_row(params, three, lengths, meant):
    state = rwkv.select(three, [0, 1])
    tokens = jnp.asarray(IDS)
    _, found = run(params, tokens, state, jnp.asarray(lengths, jnp.int32))
    _, expected = run(params, tokens, state, jnp.asarray(meant, jnp.int32))
    assert_same(found, expected)
    if 0 in meant:
        row = meant.index(0)
        assert_same(rwkv.select(found, row), rwkv.select(state, row))


@pytest.mark.parametrize("rows", [[3], [-4], [0, 2**30], [-(2**31), 1]])
def test_traced_rows_out_of_range_select_an_empty_state(three, rows):
    found = jax.jit(rwkv.select)(three, jnp.asarray(rows, jnp.int32))
    for place, row in enumerate(rows):
        expected = rwkv.select(three, row) if -3 <= row < 3 else rwkv.init_state(CONFIG)
        assert_same(rwkv.select(found, place), expected)


@pytest.mark.parametrize(("lengths", "meant"), [([-1, 9], [0, 4]), ([5, 2], [4, 2])])
def test_traced_lengths_of_the_recurrence_are_clipped(lengths, meant):
    inputs = [draw((2, 4, 2, 16)) for _ in range(6)]
    start = draw((2, 2, 16, 16))
    op = jax.jit(lambda lengths: kernels.wkv7(*inputs, start, lengths=lengths)[1])
    assert_same(op(jnp.asarray(lengths)), op(jnp.asarray(meant)))


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_traced_target_out_of_range_is_never_correct_and_affects_no_other(
    params, outside
):
    hidden = draw((2, 4, 32))
    head = params["head"]["weight"]
    targets = jnp.asarray(IDS[:, 1:])
    statistics = jax.jit(token_statistics)
    found = statistics(hidden, head, targets.at[0, 1].set(outside))
    usual = statistics(hidden, head, targets)
    others = np.ones((2, 4), bool)
    others[0, 1] = False
    np.testing.assert_array_equal(found.nats[others], usual.nats[others])
    assert not found.correct[0, 1]


def make_loss(name, params):
    """Makes one of the losses, and what it is a loss of."""
    start = rwkv.init_state(CONFIG)
    if name == "pretraining":
        return rwkv.pretrain_loss(MODEL), params
    if name == "state tuning":
        return rwkv.state_loss(MODEL, params, anchor=0.5), start
    if name == "imitation":
        return distillation_loss(MODEL, params), start
    if name == "distillation":
        loss = distillation_loss(MODEL, params, teacher=MODEL, teacher_params=params)
        return loss, start
    return policy_loss(MODEL, params, kl=0.1), start


@pytest.mark.parametrize(
    "name", ["pretraining", "state tuning", "imitation", "distillation", "policy"]
)
def test_a_counted_target_that_is_or_follows_a_bad_id_makes_the_loss_nan(params, name):
    loss, start = make_loss(name, params)
    run = jax.jit(lambda batch: loss(start, batch)[0])
    batch = {
        "tokens": jnp.asarray(IDS),
        "mask": jnp.asarray(MASK, jnp.float32),
        "advantages": jnp.ones(2),
        "anchor": jnp.asarray(IDS),
    }
    assert np.isfinite(run(batch))
    for outside in (-1, CONFIG.vocab_size):
        for row, place in ((0, 0), (1, 2), (1, 4)):
            tokens = batch["tokens"].at[row, place].set(outside)
            assert np.isnan(run(batch | {"tokens": tokens}))
            # With it, and after it, nothing counts.
            mask = batch["mask"].at[row, max(place - 1, 0) :].set(0)
            assert np.isfinite(run(batch | {"tokens": tokens, "mask": mask}))


def test_an_anchor_with_an_id_out_of_range_has_no_divergence(params):
    loss, start = make_loss("state tuning", params)
    run = jax.jit(lambda batch: loss(start, batch)[1]["anchor_nats"])
    batch = {name: jnp.asarray(IDS) for name in ("tokens", "anchor")}
    batch["mask"] = jnp.asarray(MASK, jnp.float32)
    assert np.isfinite(run(batch))
    batch["anchor"] = batch["anchor"].at[0, 1].set(-1)
    assert np.isnan(run(batch))


def test_a_step_skips_a_batch_with_a_target_out_of_range(params):
    step = rwkv.make_train_step(rwkv.state_loss(MODEL, params), optax.sgd(0.1))
    train = rwkv.TrainState.create(rwkv.init_state(CONFIG), optax.sgd(0.1))
    train, _ = step(train, on_device(MASK))
    before = jax.device_get(train)
    batch = on_device(MASK).replace(tokens=jnp.asarray(IDS).at[0, 2].set(-100))
    train, metrics = step(train, batch)
    assert np.isnan(metrics["loss"]) and float(metrics["updated"]) == 0
    assert (int(train.step), int(train.skipped)) == (2, 1)
    assert_same(jax.device_get(train).params, before.params)


@pytest.mark.parametrize("split", [[-1, 1], [5, 1], [2**30, 1], [-(2**31), 1]])
def test_a_traced_split_out_of_range_leaves_its_row_without_an_answer(split):
    cut = jax.jit(continuations)
    _, _, shares = cut(jnp.asarray(IDS), jnp.asarray(split), jnp.asarray(MASK))
    np.testing.assert_allclose(shares, [[0.0] * 4, [1 / 3] * 3 + [0.0]], rtol=1e-6)


def test_continuations_without_targets_give_nan_under_jit():
    cut = jax.jit(continuations)
    split = jnp.asarray([4, 4])
    _, _, shares = cut(jnp.asarray(IDS), split, jnp.asarray(MASK))
    assert np.isnan(shares).all()


def on_device(mask, name="mask"):
    """A batch whose numbers a step does not look at once it has seen the shapes."""
    return Batch(tokens=jnp.asarray(IDS), **{name: jnp.asarray(mask, jnp.float32)})


def optimizers(params):
    start = rwkv.init_state(CONFIG)
    memory = state_decorrelator(MODEL, params, start, method="dbp")
    weights = weight_decorrelator(MODEL)
    return {
        "state": (rwkv.state_loss(MODEL, params), start, memory),
        "weights": (rwkv.pretrain_loss(MODEL), params, weights),
    }


BAD = {
    "no target in the mask": on_device(0 * MASK),
    "no target in the weights": on_device(0 * MASK, "weights"),
    "NaN in the mask": on_device(np.nan * MASK),
    "infinity in the weights": on_device(np.inf * MASK, "weights"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "accumulate"), [("state", 1), ("weights", 2)])
def test_a_non_finite_step_changes_nothing(params, trained, accumulate):
    loss, start, decorrelator = optimizers(params)[trained]
    tx = decorrelator.wrap(optax.adamw(0.1, weight_decay=0.1))
    step = rwkv.make_train_step(
        loss, tx, statistics=decorrelator.statistics, accumulate=accumulate
    )
    train = rwkv.TrainState.create(start, tx)
    good = {"mask": on_device(MASK), "weights": on_device(MASK / 8, "weights")}
    # With moments, momentum would move parameters even where gradients are zero.
    for batch in good.values():
        train, metrics = step(train, batch)
        assert float(metrics["updated"]) == 1
    for number, (name, batch) in enumerate(BAD.items(), 1):
        before = jax.device_get(train)
        # The looks on the host are over: these shapes have been seen.
        train, metrics = step(train, batch)
        assert float(metrics["updated"]) == 0, name
        assert not np.isfinite(metrics["loss"]), name
        after = jax.device_get(train)
        assert_same(after.params, before.params)
        assert_same(after.opt_state, before.opt_state)
        assert (int(after.step), int(after.skipped)) == (number + 2, number)


@pytest.mark.parametrize("name", ["mask", "weights"])
def test_an_evaluation_without_targets_has_no_loss(params, name):
    evaluate = rwkv.make_eval_step(rwkv.pretrain_loss(MODEL))
    assert np.isfinite(evaluate(params, on_device(MASK, name))["loss_nats"])
    assert np.isnan(evaluate(params, on_device(0 * MASK, name))["loss_nats"])


def test_scaling_a_mask_does_not_change_the_mean(params):
    loss = jax.jit(rwkv.pretrain_loss(MODEL, l2wrap=0.0))
    halves = NOISE.random((2, 4))
    whole, _ = loss(params, on_device(halves))
    for factor in (1e-3, 0.1, 10.0):
        part, _ = loss(params, on_device(factor * halves))
        assert float(part) == pytest.approx(float(whole), rel=1e-5)
