"""An observer's loss, its gradients and its evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_observers
from tiny_observers import LENGTH, ROWS, SPLITS, TEACHER, by_rows
from tolerances import SAME, assert_close

from rwkv7_jax.model.state import init_state
from rwkv7_jax.observer.evaluation import evaluate_handover, proposal_error
from rwkv7_jax.observer.loss import observer_loss
from rwkv7_jax.observer.observer import state_moments
from rwkv7_jax.training.head_loss import token_statistics
from rwkv7_jax.training.train_step import TrainState, make_train_step

mirror = pytest.fixture(tiny_observers.mirror, scope="module")
teacher = pytest.fixture(tiny_observers.teacher, scope="module")
made = pytest.fixture(tiny_observers.made, scope="module")
batch = pytest.fixture(tiny_observers.batch, scope="module")
own = pytest.fixture(tiny_observers.own, scope="module")
proposed = pytest.fixture(tiny_observers.proposed, scope="module")


@pytest.fixture(scope="module")
def step(made, teacher):
    """`(params, batch)` -> the loss and its metrics, and of each the gradients, teacher's first."""
    loss = observer_loss(made[0], *teacher)
    assert jax.tree.structure(loss.args[0]) == jax.tree.structure(teacher[1])

    @jax.jit
    def run(frozen, params, batch):
        def numbers(frozen, params):
            value, metrics = loss.func(frozen, params, batch)
            numbers = metrics | {"loss": value}
            return numbers, numbers

        gradients, numbers = jax.jacrev(numbers, argnums=(0, 1), has_aux=True)(
            frozen, params
        )
        return numbers, gradients

    # In numpy, for every new shape of an operation outside of a program is compiled anew.
    return lambda params, batch: jax.tree.map(
        np.asarray, run(teacher[1], params, batch)
    )


@pytest.fixture(scope="module")
def result(step, made, batch):
    return step(made[1], batch)


def test_every_part_of_an_observer_learns(result):
    _, gradients = result
    _, grads = gradients["loss"]
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("term", ["fvu", "answer_nats"])
def test_each_term_reaches_the_model_through_the_maps(term, result):
    _, gradients = result
    _, grads = gradients[term]
    for leaf in (
        grads["left"],
        grads["right"],
        grads["bias"],
        grads["model"]["emb"]["weight"],
    ):
        assert np.abs(leaf).max() > 0


def test_the_divergence_moves_only_the_small_model(result):
    _, gradients = result
    _, grads = gradients["divergence_nats"]
    assert np.abs(grads["model"]["head"]["weight"]).max() > 0
    assert not any(grads[name].any() for name in ("left", "right", "bias"))


def test_no_gradient_reaches_the_teacher(result):
    _, gradients = result
    for frozen, _ in gradients.values():
        assert all(not leaf.any() for leaf in jax.tree.leaves(frozen))


def test_the_loss_is_the_weighted_sum_of_its_terms(result):
    found, _ = result
    total = found["fvu"] + 0.5 * found["divergence_nats"] + found["answer_nats"]
    assert float(found["loss"]) == pytest.approx(float(total), rel=1e-6)
    assert float(found["loss_nats"]) == float(found["answer_nats"])


def test_states_at_the_splits_match_separate_prompts(own, proposed, result):
    wanted, came = (np.asarray(state.wkv, np.float64) for _, state in (own, proposed))
    variance = wanted.var(axis=1).mean(axis=(2, 3))
    error = np.square(came - wanted).mean(axis=(1, 3, 4))
    assert float(result[0]["fvu"]) == pytest.approx((error / variance).mean(), rel=1e-5)


def test_answers_match_separately_continued_rows(teacher, batch, proposed, result):
    nats, _ = by_rows(teacher, proposed[1], batch)
    assert float(result[0]["answer_nats"]) == pytest.approx(nats, rel=1e-5)


def test_the_divergence_is_the_mean_over_prompts(own, proposed, result):
    total = 0.0
    for base, tuned in zip(own[0], proposed[0], strict=True):
        base = jax.nn.log_softmax(base)
        tuned = jax.nn.log_softmax(tuned)
        total += float(jnp.sum(jnp.exp(base) * (base - tuned)))
    assert float(result[0]["divergence_nats"]) == pytest.approx(
        total / sum(SPLITS), rel=1e-5
    )


def test_models_of_other_widths_diverge_by_their_own_heads():
    x, base, head, other = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, 3, 4), (2, 3, 6), (5, 4), (5, 6)])
    )
    tuned = jax.nn.log_softmax(x @ head.T)
    reference = jax.nn.log_softmax(base @ other.T)
    wanted = jnp.sum(jnp.exp(reference) * (reference - tuned), -1)
    found = token_statistics(
        x, head, None, reference=base, reference_head=other, chunk=2
    ).kl
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_without_answers_tokens_after_the_splits_have_no_effect(made, teacher, batch):
    loss = jax.jit(observer_loss(made[0], *teacher, answers=0.0))
    later = np.arange(LENGTH + 1)[None] >= batch["split"][:, None]
    other = batch | {
        "tokens": np.where(later, (batch["tokens"] + 7) % 23, batch["tokens"])
    }
    other |= {"mask": 1 - batch["mask"]}
    one, metrics = loss(made[1], batch)
    two, _ = loss(made[1], other)
    assert float(one) == float(two)
    # No loss of a language model was computed, so none is reported.
    assert set(metrics) == {"fvu", "divergence_nats"}
    total = metrics["fvu"] + 0.5 * metrics["divergence_nats"]
    assert float(one) == pytest.approx(float(total), rel=1e-6)


@pytest.mark.parametrize(
    ("term", "rows", "names"),
    [
        ("variance", ROWS, {"fvu"}),
        ("divergence", 1, {"divergence_nats"}),
        ("answers", 1, {"answer_nats", "loss_nats"}),
    ],
)
def test_a_term_of_weight_0_asks_nothing_of_a_batch(
    term, rows, names, made, teacher, batch
):
    """Answers are required only to average their loss, two rows only for their variance."""
    batch = {name: part[:rows] for name, part in batch.items()}
    if term != "answers":
        batch["mask"] = np.zeros_like(batch["mask"])
    weights = {"variance": 0.0, "divergence": 0.0, "answers": 0.0, term: 1.0}
    loss = observer_loss(made[0], *teacher, **weights)
    _, metrics = jax.eval_shape(lambda params: loss(params, batch), made[1])
    assert set(metrics) == names


def test_masked_targets_and_those_in_the_prompt_do_not_count(step, made, batch, result):
    prompt = np.arange(LENGTH)[None] < batch["split"][:, None]
    other, _ = step(
        made[1], batch | {"mask": np.where(prompt, np.float32(5), batch["mask"])}
    )
    assert float(other["answer_nats"]) == pytest.approx(
        float(result[0]["answer_nats"]), rel=1e-6
    )


def test_a_batch_without_answers_has_no_loss(step, made, batch):
    found, _ = step(made[1], batch | {"mask": np.zeros_like(batch["mask"])})
    # Not 0, which would look perfect; a train step leaves such a batch out.
    assert np.isnan(found["answer_nats"])
    assert np.isfinite(found["fvu"])
    assert np.isfinite(found["divergence_nats"])


def test_a_batch_of_empty_prompts_has_no_divergence(step, made, batch):
    found, _ = step(made[1], batch | {"split": np.zeros_like(batch["split"])})
    assert np.isnan(found["divergence_nats"])
    assert np.isfinite(found["answer_nats"])


def test_a_term_that_reads_an_unknown_id_is_nan(step, made, batch):
    # A compiled loss cannot check its ids. The last one is only a target of the answers.
    for place, terms in (
        (-1, {"answer_nats"}),
        (2, {"answer_nats", "divergence_nats"}),
    ):
        tokens = batch["tokens"].copy()
        tokens[0, place] = TEACHER.vocab_size
        found, _ = step(made[1], batch | {"tokens": tokens})
        nats = ("answer_nats", "divergence_nats")
        assert {name for name in nats if np.isnan(found[name])} == terms


def test_the_proposal_error_is_the_unexplained_variance_row_by_row(
    made, teacher, batch, result
):
    tokens = batch["tokens"][:, :-1]
    lengths = batch["split"]
    rows = proposal_error(*made, *teacher, tokens, lengths=lengths)
    assert float(rows.mean()) == pytest.approx(float(result[0]["fvu"]), rel=1e-5)
    variance = np.asarray(state_moments(*teacher, tokens, lengths).variance)
    alone = proposal_error(*made, *teacher, tokens[2:3, :9], variance=variance)
    assert float(alone[0]) == pytest.approx(float(rows[2]), rel=1e-4)


def test_the_handover_metrics_are_four_continuations(teacher, batch, own, proposed):
    found = evaluate_handover(*teacher, proposed[1], batch)
    zero = init_state(TEACHER, ROWS)
    starts = {"zero": zero, "wkv": zero.replace(wkv=own[1].wkv), "own": own[1]}
    assert set(found) == {*starts, "proposed"}
    for name, start in (starts | {"proposed": proposed[1]}).items():
        nats, accuracy = by_rows(teacher, start, batch)
        assert found[name].nats == pytest.approx(nats, rel=1e-5), name
        assert found[name].accuracy == pytest.approx(accuracy, rel=1e-6), name


def test_a_single_start_state_is_used_for_all_rows(teacher, batch):
    found = evaluate_handover(*teacher, init_state(TEACHER), batch)
    assert found["proposed"] == found["zero"]


def test_a_few_gradient_steps_lower_the_loss(step, made, batch, result):
    params = made[1]
    for _ in range(4):
        _, grads = step(params, batch)[1]["loss"]
        params = jax.tree.map(
            lambda leaf, grad: np.asarray(leaf) - 0.02 * grad, params, grads
        )
    assert float(step(params, batch)[0]["loss"]) < float(result[0]["loss"])


def down(made, teacher, batch, *, accumulate):
    tx = optax.sgd(1.0)
    step = make_train_step(observer_loss(made[0], *teacher), tx, accumulate=accumulate)
    train, metrics = step(TrainState.create(made[1], tx), batch)
    return metrics, train.params


@pytest.fixture(scope="module")
def uneven(batch):
    """Pieces must not be alike in length, or a mean of means would pass."""
    return batch | {"split": np.array([2, 9, 12, 4], np.int32)}


@pytest.fixture(scope="module")
def in_one(made, teacher, uneven):
    return down(made, teacher, uneven, accumulate=1)


@pytest.mark.parametrize("accumulate", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_microbatches_give_the_loss_and_gradient_of_the_batch(
    made, teacher, uneven, in_one, accumulate
):
    """Prompts, answers and states differ from piece to piece; of four pieces each is one row."""
    expected, whole = in_one
    metrics, pieces = down(made, teacher, uneven, accumulate=accumulate)
    for name in ("loss", "fvu", "divergence_nats", "answer_nats", "loss_nats"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-5), (
            name
        )
    gradients = []
    for params in (whole, pieces):
        moves = jax.tree.map(jnp.subtract, made[1], params)
        gradients.append(
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(moves)])
        )
    assert_close(gradients[1], gradients[0], SAME["micro-batches"], "gradient")


def test_splits_of_8_bits_are_counted_in_rows_of_any_length(made, teacher):
    loss = observer_loss(made[0], *teacher, variance=0.0, answers=0.0).func
    pieces = {
        "tokens": np.zeros((2, 1, 201), np.int32),
        "weights": np.ones((2, 1, 200), np.float32),
        "split": np.array([[100], [50]], np.int8),
    }
    assert float(loss.batch_totals({}, pieces).prompt_tokens) == 75


@pytest.mark.slow
def test_training_lowers_every_term_and_changes_no_bit_of_the_teacher(
    made, teacher, batch
):
    before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), teacher[1])
    tx = optax.adam(1e-2)
    step = make_train_step(observer_loss(made[0], *teacher), tx)
    train = TrainState.create(made[1], tx)
    seen = []
    for _ in range(60):
        train, metrics = step(train, batch)
        seen.append(metrics)
    for name in ("loss", "fvu", "divergence_nats", "answer_nats"):
        assert float(seen[-1][name]) < 0.8 * float(seen[0][name]), name
    assert int(train.skipped) == 0
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), before, teacher[1])
    )
