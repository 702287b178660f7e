"""The training step: accumulation, skipped updates, no second compilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from tiny_models import lively, random_state, tokens
from tolerances import SAME, assert_close, assert_trees_close

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.optim.decorrelation import decorrelate
from rwkv7_jax.training.gradients import with_shares
from rwkv7_jax.training.losses import pretrain_loss
from rwkv7_jax.training.train_step import TrainState, make_eval_step, make_train_step
from rwkv7_jax.tuning.state_tuning import state_loss

# One layer: gradients through scanned layers take three times as long to compile.
CONFIG = RWKV7Config(
    vocab_size=13,
    num_layers=1,
    width=32,
    head_size=16,
    ffn_width=48,
    implementation="scan",
)
LOSS = pretrain_loss(RWKV7(CONFIG))
# Rows that count 6, 1, 0 and 3 targets: micro-batches of different weight, one of them empty.
MASK = jnp.asarray(
    [[1] * 6, [0, 1, 0, 0, 0, 0], [0] * 6, [1, 0, 1, 0, 1, 0]], jnp.float32
)
BATCH = {"tokens": tokens(4, 7, CONFIG), "mask": MASK}
PLAIN = optax.sgd(1.0)


@functools.cache
def step(accumulate=1):
    """A step whose update is minus the gradient."""
    return make_train_step(LOSS, PLAIN, accumulate=accumulate)


@functools.cache
def one_batch():
    """The state and metrics after one step on the batch in one piece."""
    return step()(TrainState.create(lively(CONFIG), PLAIN), BATCH)


@pytest.mark.parametrize("accumulate", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_microbatches_give_the_gradient_of_the_batch(accumulate):
    train, metrics = step(accumulate)(TrainState.create(lively(CONFIG), PLAIN), BATCH)
    whole, expected = one_batch()
    gradients = [
        jax.tree.map(jnp.subtract, lively(CONFIG), x.params) for x in (train, whole)
    ]
    flat = [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in gradients
    ]
    assert_close(*flat, SAME["micro-batches"], "gradient")
    for name in ("loss", "loss_nats", "grad_norm"):
        assert_close(metrics[name], expected[name], SAME["micro-batches"], name)


def test_many_microbatches_lose_nothing_in_parameters_of_16_bits():
    rows = np.random.default_rng(0).uniform(0.5, 1.5, (256, 8)).astype(np.float32)
    batch = {"tokens": rows, "mask": np.ones((256, 7), np.float32)}

    def weighed(params, batch):
        shares = jnp.sum(batch["weights"], axis=1)
        return shares @ (batch["tokens"] @ params["x"].astype(jnp.float32))

    for accumulate in (1, 256):
        train = TrainState.create({"x": jnp.zeros(8, jnp.bfloat16)}, PLAIN)
        train, _ = make_train_step(weighed, PLAIN, accumulate=accumulate)(train, batch)
        assert train.params["x"].dtype == jnp.bfloat16
        # A rounding to 8 bits, not one for each microbatch.
        moved = -np.float32(train.params["x"])
        np.testing.assert_allclose(moved, rows.mean(0), rtol=0.005)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_norm_of_gradients_of_16_bits_is_as_exact_as_of_float32(dtype):
    # Squares above 65,504 overflow in float16; in bfloat16 sums have 8 bits.
    slopes = [jnp.full(3, 300.0 + number, dtype) for number in range(30)]

    def linear(params, batch):
        products = jax.tree.map(jnp.vdot, params, slopes)
        return sum(product.astype(jnp.float32) for product in products)

    params = [jnp.zeros(3, dtype)] * 30
    train = TrainState.create(params, optax.sgd(1e-3))
    train, metrics = make_train_step(linear, optax.sgd(1e-3))(train, BATCH)
    exact = np.linalg.norm(np.concatenate([np.float64(slope) for slope in slopes]))
    assert metrics["grad_norm"].dtype == jnp.float32 and metrics["updated"] == 1
    np.testing.assert_allclose(metrics["grad_norm"], exact, rtol=1e-5)


def test_accumulation_must_divide_the_batch():
    sentence = "make_train_step: `accumulate` must divide the batch of 4 rows; got 3."
    with pytest.raises(ValueError) as caught:
        step(3)(TrainState.create(lively(CONFIG), PLAIN), BATCH)
    assert str(caught.value) == sentence


def test_accumulation_must_divide_the_rows_of_the_anchor():
    batch = BATCH | {"anchor": tokens(3, 7, CONFIG)}
    sentence = "`accumulate` must divide the 3 rows of the batch's anchor; got 2"
    with pytest.raises(ValueError, match=sentence):
        step(2)(TrainState.create(lively(CONFIG), PLAIN), batch)


def test_a_loss_that_normalizes_by_the_mask_of_a_microbatch_is_rejected():
    def forgetful(params, batch):
        mask = batch["mask"]
        loss = (
            jnp.sum(mask)
            * jnp.sum(jnp.square(params["x"]))
            / jnp.maximum(jnp.sum(mask), 1.0)
        )
        return loss, {}

    batch = {"tokens": BATCH["tokens"], "mask": MASK}
    train = TrainState.create({"x": jnp.ones(3)}, PLAIN)
    make_train_step(forgetful, PLAIN)(train, batch)
    sentence = "make_train_step: `loss` must weight targets by `loss_weights.*reads only the mask"
    # A compiled function gets all arrays, whether it reads them or not.
    for loss in (forgetful, jax.jit(forgetful), jax.checkpoint(forgetful)):
        train = TrainState.create({"x": jnp.ones(3)}, PLAIN)
        with pytest.raises(ValueError, match=sentence):
            make_train_step(loss, PLAIN, accumulate=2)(train, batch)


def test_a_scalar_in_a_batch_is_passed_to_the_loss():
    def scaled_by_batch(params, batch):
        weights = jnp.sum(batch["weights"])
        return batch["scale"] * weights * jnp.sum(jnp.square(params["x"])), {}

    batch = {"tokens": BATCH["tokens"], "mask": MASK, "scale": np.float32(0.5)}
    train = TrainState.create({"x": jnp.ones(3)}, PLAIN)
    train, _ = make_train_step(scaled_by_batch, PLAIN)(train, batch)
    assert_close(train.params["x"], np.zeros(3), SAME["micro-batches"])
    with pytest.raises(ValueError, match="the batch's scale must have rows"):
        make_train_step(scaled_by_batch, PLAIN, accumulate=2)(train, batch)


@pytest.mark.parametrize("weights", [{}, {"weights": MASK / 5}])
def test_a_loss_of_weights_is_trained_and_evaluated_alike(weights):
    def weighed(params, batch):
        return jnp.sum(batch["weights"]) * jnp.sum(params["x"])

    batch = {**BATCH, **weights}
    train = TrainState.create({"x": jnp.ones(3)}, PLAIN)
    _, found = make_train_step(weighed, PLAIN)(train, batch)
    evaluated = make_eval_step(weighed)({"x": jnp.ones(3)}, batch)
    assert evaluated["loss"] == found["loss"]
    without = make_eval_step(lambda params, batch: jnp.sum(params["x"]))
    assert without({"x": jnp.ones(3)}, {"tokens": BATCH["tokens"]})["loss"] == 3


@pytest.mark.parametrize("metrics", [(), (None,), ({"other": jnp.float32(3)},)])
def test_a_loss_may_have_no_metrics(metrics):
    def squared(params, batch):
        value = jnp.sum(batch["mask"]) * jnp.sum(jnp.square(params["x"]))
        return (value, *metrics) if metrics else value

    train = TrainState.create({"x": jnp.ones(3)}, PLAIN)
    _, found = make_train_step(squared, PLAIN)(train, BATCH)
    assert found["loss"] == 30
    evaluated = make_eval_step(squared)({"x": jnp.ones(3)}, BATCH)
    assert evaluated == ({"other": 3} if metrics[:1] and metrics[0] else {"loss": 30})


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (jnp.ones(2), "an array of shape \\(2,\\) and dict"),
        ((1.0, 2.0), "float and float"),
        (((1.0, {}), 2.0), "tuple and float"),
        ((1.0, {}, 2.0), "a tuple of 3"),
    ],
)
def test_an_object_that_is_no_loss_is_named(result, sentence):
    def wrong(params, batch):
        return result

    train = TrainState.create({"x": jnp.ones(3)}, PLAIN)
    with pytest.raises(
        TypeError, match=f"^`loss` must return a scalar.* got {sentence}"
    ):
        make_train_step(wrong, PLAIN)(train, BATCH)


def test_an_optimizer_that_decorrelates_needs_statistics():
    # Alone, and inside of others.
    for tx in (decorrelate(PLAIN), optax.chain(optax.clip(1.0), decorrelate(PLAIN))):
        train = TrainState.create(lively(CONFIG), tx)
        with pytest.raises(ValueError, match=r"^`statistics` must be given if `tx`"):
            make_train_step(LOSS, tx)(train, BATCH)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int8])
def test_narrow_integer_ids_train_like_wide_ones(unchecked, dtype):
    batch = BATCH | {"tokens": np.asarray(BATCH["tokens"], dtype)}
    train, metrics = step()(TrainState.create(lively(CONFIG), PLAIN), batch)
    expected, expected_metrics = one_batch()
    assert metrics["loss"] == expected_metrics["loss"]
    assert_trees_close(train.params, expected.params, 0)


class Spread:
    """A loss of the tokens' spread around the mean over all rows, which no piece knows."""

    def __call__(self, params, batch, totals=None):
        x = params["x"][None] * batch["tokens"]
        mean = jnp.mean(batch["tokens"]) if totals is None else totals
        return jnp.mean(jnp.square(x - mean)), {}

    def batch_totals(self, pieces):
        return jnp.mean(pieces["tokens"])


def test_totals_over_the_batch_normalize_its_microbatches():
    batch = {"tokens": jnp.arange(12.0).reshape(4, 3) ** 2, "mask": jnp.ones((4, 2))}
    ends = []
    for accumulate in (1, 2, 4):
        train = TrainState.create({"x": jnp.ones(3)}, PLAIN)
        train, metrics = make_train_step(Spread(), PLAIN, accumulate=accumulate)(
            train, batch
        )
        ends.append((metrics["loss"], train.params["x"]))
    for loss, x in ends[1:]:
        assert_close(loss, ends[0][0], SAME["micro-batches"])
        assert_close(x, ends[0][1], SAME["micro-batches"])


def test_the_step_descends_along_the_gradient_of_the_loss():
    train, metrics = one_batch()
    (value, _), grads = jax.jit(jax.value_and_grad(LOSS, has_aux=True))(
        lively(CONFIG), BATCH
    )
    assert_close(metrics["loss"], value, SAME["model"], "loss")
    assert_trees_close(
        train.params, jax.tree.map(jnp.subtract, lively(CONFIG), grads), SAME["model"]
    )
    assert (int(train.step), int(train.skipped)) == (1, 0)


def square(params, batch):
    """A loss that is not finite where the batch is not."""
    loss = jnp.sum(jnp.square(params["x"])) * jnp.mean(batch["tokens"])
    return loss, {"loss_nats": loss}


def small(value):
    """A batch of two rows of numbers."""
    return {"tokens": jnp.full((2, 3), value, jnp.float32), "mask": jnp.ones((2, 2))}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_non_finite_update_changes_no_bit(bad):
    tx = optax.adam(0.1)
    run = make_train_step(square, tx)
    train, _ = run(TrainState.create({"x": jnp.arange(3.0)}, tx), small(1.0))
    before = jax.tree.map(np.asarray, (train.params, train.opt_state))
    train, metrics = run(train, small(bad))
    jax.tree.map(np.testing.assert_array_equal, (train.params, train.opt_state), before)
    assert (int(train.step), int(train.skipped)) == (2, 1)
    assert not np.isfinite(metrics["loss"])
    train, _ = run(train, small(1.0))
    assert not np.array_equal(train.params["x"], before[0]["x"])


def test_a_non_finite_loss_gradient_or_update_alone_skips_the_update():
    # The gradient of a root is infinite at 0, and 2 at 1/16, where the update divides by 0.
    tx = optax.stateless_with_tree_map(lambda gradient, _: 1 / (gradient - 2))

    def root(params, batch):
        inside, added = batch["tokens"][0]
        return jnp.sqrt(params["x"] + inside) + added

    run = make_train_step(root, tx)
    skipped = []
    for numbers in ((1.0, jnp.nan), (0.0, 0.0), (1 / 16, 0.0), (1.0, 0.0)):
        batch = {"tokens": jnp.array([numbers]), "mask": jnp.ones((1, 1))}
        train, _ = run(TrainState.create({"x": jnp.zeros(())}, tx), batch)
        skipped.append(int(train.skipped))
    assert skipped == [1, 1, 1, 0]


def test_a_batch_whose_own_weights_are_all_0_has_no_finite_share():
    batch = with_shares(BATCH | {"weights": jnp.zeros((4, 6))}, 1)
    assert np.isnan(batch["weights"]).all()


def test_one_non_finite_microbatch_skips_the_update():
    tx = optax.adam(0.1)
    batch = small(1.0)
    batch["tokens"] = batch["tokens"].at[1].set(jnp.nan)
    run = make_train_step(square, tx, accumulate=2)
    train, _ = run(TrainState.create({"x": jnp.arange(3.0)}, tx), batch)
    np.testing.assert_array_equal(train.params["x"], np.arange(3.0))
    assert (int(train.step), int(train.skipped)) == (1, 1)


@pytest.mark.slow
def test_microbatches_give_the_gradient_of_an_anchored_state():
    """The anchor counts every token of its own rows, the loss those of the mask."""
    model = RWKV7(CONFIG)
    loss = state_loss(model, lively(CONFIG), anchor=0.5, l2wrap=1e-2)
    start = random_state(CONFIG)
    batch = BATCH | {"anchor": tokens(4, 7, CONFIG, seed=1)}
    ends = []
    for accumulate in (1, 4):
        train = TrainState.create(start, PLAIN)
        train, metrics = make_train_step(loss, PLAIN, accumulate=accumulate)(
            train, batch
        )
        ends.append(
            (start.wkv - train.params.wkv, metrics["loss"], metrics["anchor_nats"])
        )
    for whole, pieces in zip(*ends, strict=True):
        assert_close(pieces, whole, SAME["micro-batches"])


def test_the_second_step_does_not_compile_and_large_arrays_are_arguments():
    traces = []

    def loss(frozen, params, batch):
        traces.append(1)
        return square({"x": params["x"] * frozen}, batch)

    tx = optax.adam(0.1)
    run = make_train_step(Partial(loss, jnp.ones(3)), tx)
    train = TrainState.create({"x": jnp.ones(3)}, tx)
    for value in (1.0, 2.0, 3.0):
        train, _ = run(train, small(value))
    assert len(traces) == 1


@pytest.mark.parametrize("number", [1.0, jnp.asarray(1.0)])
def test_parameters_of_weak_types_do_not_compile_again(number):
    traces = []

    def loss(params, batch):
        traces.append(1)
        return square(params, batch)

    tx = optax.adam(0.1)
    run = make_train_step(loss, tx)
    train = TrainState.create({"x": number}, tx)
    for value in (1.0, 2.0, 3.0):
        train, _ = run(train, small(value))
    assert len(traces) == 1


def scaled(params, batch):
    """A square whose slope the batch scales."""
    value = jnp.sum(params["x"] ** 2) * jnp.mean(batch["tokens"])
    return value, {}


def test_an_optimizer_that_needs_the_loss_receives_it():
    batch = {"tokens": np.full((1, 3), 2), "mask": np.ones((1, 2), np.float32)}
    for tx in (
        optax.polyak_sgd(max_learning_rate=1.0),
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    ):
        train = TrainState.create({"x": jnp.ones(3)}, tx)
        run = make_train_step(Partial(scaled), tx)
        train, first = run(train, batch)
        train, second = run(train, batch)
        assert second["loss"] < first["loss"]


def first_step(tx):
    batch = {"tokens": np.full((1, 3), 2), "mask": np.ones((1, 2), np.float32)}
    train = TrainState.create({"x": jnp.ones(3)}, tx)
    make_train_step(Partial(scaled), tx)(train, batch)


def test_an_optimizer_that_needs_other_arguments_is_named():
    said = "`tx` must need only gradients"
    with pytest.raises(TypeError, match=f"^{said}.*'value_fn'"):
        first_step(optax.lbfgs())
    # Its parameters are pairs.
    with pytest.raises(TypeError, match=f"^{said}.*'fast'"):
        first_step(optax.lookahead(optax.sgd(0.1), 5, 0.5))


@pytest.mark.parametrize("error", [TypeError, AttributeError])
def test_an_error_inside_an_optimizer_is_not_reworded(error):
    def update(updates, state, params=None):
        raise error("mine")

    with pytest.raises(error, match=r"^mine"):
        first_step(optax.GradientTransformation(lambda _: (), update))


def test_an_optimizer_state_may_alias_the_parameters():
    tx = optax.GradientTransformation(
        lambda params: (params, params),
        lambda updates, state, params=None: (updates, state),
    )
    first_step(tx)
    first_step(optax.contrib.prodigy())


def test_an_optimizer_state_may_hold_an_array_twice():
    def start(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, zeros

    first_step(
        optax.GradientTransformation(
            start, lambda updates, state, params=None: (updates, state)
        )
    )


@pytest.mark.parametrize("leaf", [np.arange(3), "words", jnp.ones(3, bool)])
def test_parameters_that_cannot_be_trained_are_rejected_by_create(leaf):
    sentence = r"TrainState.create: `params`\['x'\] must be an array of floating point"
    with pytest.raises(TypeError, match=sentence):
        TrainState.create({"x": leaf}, PLAIN)


def test_a_mesh_with_explicit_axes_is_rejected():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match="`mesh` must have axes of type"):
        make_train_step(LOSS, PLAIN, mesh=mesh)


@pytest.mark.parametrize("trained", ["weights", "state"])
def test_strict_promotion_allows_bfloat16(trained):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    model = RWKV7(config)
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), lively(CONFIG))
    loss = pretrain_loss(model)
    start = weights
    if trained == "state":
        # Its leaves have two dtypes.
        loss = state_loss(model, weights, leaves=("wkv", "att_shift"))
        start = init_state(config)
    with jax.numpy_dtype_promotion("strict"):
        train = TrainState.create(start, PLAIN)
        # Traced only: promotion is decided there.
        step = make_train_step(loss, PLAIN, accumulate=2).trace(train, BATCH)
    new, _ = step.out_info
    kinds = jax.tree.map(lambda leaf: leaf.dtype, (new.params, start))
    assert kinds[0] == kinds[1]


def test_create_copies_so_that_the_callers_parameters_survive_the_step():
    params = {"x": jnp.arange(3.0)}
    make_train_step(square, PLAIN)(TrainState.create(params, PLAIN), small(1.0))
    np.testing.assert_array_equal(params["x"], np.arange(3.0))


def test_evaluation_reports_the_metrics_of_the_same_loss():
    assert_close(
        make_eval_step(LOSS)(lively(CONFIG), BATCH)["loss_nats"],
        one_batch()[1]["loss_nats"],
        1e-6,
    )


def test_lower_and_trace_check_their_arguments():
    train = TrainState.create(lively(CONFIG), PLAIN)
    described = jax.eval_shape(lambda: (train, BATCH))
    compiled = step().lower(*described).compile()
    assert compiled.cost_analysis()["flops"] > 0
    traced = step().trace(train, batch=BATCH)
    assert traced.out_info == step().trace(*described).out_info
    for method in (step().lower, step().trace):
        with pytest.raises(ValueError, match="make_train_step: `batch` must hold"):
            method(train, {"tokens": BATCH["tokens"]})
    after, metrics = compiled(*step().args, train, BATCH)
    expected, wanted = one_batch()
    for one, two in zip(
        jax.tree.leaves((after, metrics)),
        jax.tree.leaves((expected, wanted)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


def test_lowering_does_not_mark_the_ids_of_a_batch_as_checked():
    one = make_train_step(LOSS, PLAIN)
    train = TrainState.create(lively(CONFIG), PLAIN)
    one.lower(*jax.eval_shape(lambda: (train, BATCH)))
    wrong = BATCH | {"tokens": BATCH["tokens"] + CONFIG.vocab_size}
    with pytest.raises(ValueError, match=r"make_train_step: `batch.tokens` must"):
        one(train, jax.device_put(wrong))
