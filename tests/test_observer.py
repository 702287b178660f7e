"""An observer's laws: what it can propose, what moves it, what its numbers mean."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from rwkv7_jax.checkpoint import model_hash
from rwkv7_jax.config import RWKV7Config
from rwkv7_jax.loss import divergence
from rwkv7_jax.model import RWKV7
from rwkv7_jax.observer import (
    Observer,
    init_observer,
    moments,
    propose,
    state_moments,
    unexplained,
)
from rwkv7_jax.observer_evaluation import drift, handover
from rwkv7_jax.observer_files import MAPS, MODEL, load_observer, observer_info, save_observer
from rwkv7_jax.observer_training import observer_loss
from rwkv7_jax.splits import split_batch, tails
from rwkv7_jax.state import init_state, repeat, select, stack
from rwkv7_jax.tensor_files import write_safetensors
from rwkv7_jax.training import TrainState, make_train_step

# The scan compiles fastest; that all implementations agree is test_wkv_laws.py's business.
REST = {"decay_rank": 4, "icl_rank": 4, "value_rank": 3, "gate_rank": 5, "implementation": "scan"}
# 2 layers of 2 heads of 16 are proposed from 1 layer of 3 heads of 8.
TEACHER = RWKV7Config(vocab_size=23, num_layers=2, width=32, head_size=16, **REST)
SMALL = RWKV7Config(vocab_size=23, num_layers=1, width=24, head_size=8, **REST)
# Prompts and what is behind them have 4 and 9 inputs: two lengths for the plain model to compile.
ROWS, LENGTH = 4, 13
SPLITS = (4, 9, 9, 4)


def alive(params, seed):
    """The tree plus noise on every leaf: a new model's output matrices are zero."""
    noise = np.random.default_rng(seed)
    draw = lambda x: np.asarray(x) + np.float32(0.2) * noise.normal(size=x.shape)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(draw(x), jnp.float32), params)


@pytest.fixture(scope="module")
def mirror():
    """An observer that is the teacher."""
    observer, params = init_observer(TEACHER, TEACHER, jax.random.key(0))
    return observer, params | {"model": alive(params["model"], 1)}


@pytest.fixture(scope="module")
def teacher(mirror):
    observer, params = mirror
    return observer.model, params["model"]


@pytest.fixture(scope="module")
def made():
    """An observer whose parameters are all alive."""
    bias = 0.1 * jax.random.normal(jax.random.key(4), (2, 2, 16, 16))
    observer, params = init_observer(SMALL, TEACHER, jax.random.key(3), bias=bias)
    np.testing.assert_array_equal(params["bias"], bias)
    return observer, params | {"model": alive(params["model"], 5)}


@pytest.fixture(scope="module")
def batch():
    noise = np.random.default_rng(6)
    mask = (noise.random((ROWS, LENGTH)) < 0.7).astype(np.float32)
    mask[:, -1] = 1
    tokens = np.array(tiny_models.tokens(ROWS, LENGTH + 1, TEACHER))
    return {"tokens": tokens, "mask": mask, "split": np.array(SPLITS, np.int32)}


@functools.partial(jax.jit, static_argnums=0)
def plain(model, params, tokens, state):
    """The model as anybody calls it."""
    return model.apply({"params": params}, tokens, state)


def prompts_alone(model, params, batch):
    """Logits and states of every row's prompt, each read alone and cut at its split."""
    start = init_state(model.config)
    rows = [batch["tokens"][i : i + 1, :split] for i, split in enumerate(SPLITS)]
    logits, ends = zip(*(plain(model, params, row, start) for row in rows), strict=True)
    return logits, stack(list(ends))


@pytest.fixture(scope="module")
def own(teacher, batch):
    """The teacher's logits and states in the prompts."""
    return prompts_alone(*teacher, batch)


@pytest.fixture(scope="module")
def proposed(made, batch):
    """What the observer's rows, read alone, propose by the formula; and its logits."""
    observer, params = made
    logits, end = prompts_alone(observer.model, params["model"], batch)
    left, right, sources = (
        np.asarray(x, np.float64) for x in (params["left"], params["right"], end.wkv)
    )
    wkv = np.einsum("lhjvm,bjmp,lhjkp->lbhvk", left, sources[0], right)
    wkv += np.asarray(params["bias"])[:, None]
    return logits, init_state(TEACHER, ROWS).replace(wkv=jnp.asarray(wkv, jnp.float32))


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

        gradients, numbers = jax.jacrev(numbers, argnums=(0, 1), has_aux=True)(frozen, params)
        return numbers, gradients

    # In numpy, for every new shape of an operation outside of a program is compiled anew.
    return lambda params, batch: jax.tree.map(np.asarray, run(teacher[1], params, batch))


@pytest.fixture(scope="module")
def result(step, made, batch):
    return step(made[1], batch)


def selecting(mirror, places):
    """The mirror with maps that put its state number `places[i]` at layer and head i."""
    observer, params = mirror
    maps = np.einsum("ab,vm->abvm", np.eye(len(places))[places], np.eye(TEACHER.head_size))
    maps = jnp.asarray(maps.reshape(params["left"].shape), jnp.float32)
    return observer, params | {"left": maps, "right": maps}


def by_rows(teacher, start, batch):
    """The loss and the accuracy behind the splits, each row continued alone from its state."""
    total = np.zeros(3)
    for i, split in enumerate(SPLITS):
        inputs, targets = batch["tokens"][i : i + 1, split:-1], batch["tokens"][i, split + 1 :]
        logits, mask = plain(*teacher, inputs, select(start, i))[0][0], batch["mask"][i, split:]
        nats = -jax.nn.log_softmax(logits)[np.arange(len(targets)), targets]
        hits = np.argmax(logits, -1) == targets
        total += [np.sum(nats * mask), np.sum(hits * mask), mask.sum()]
    return total[0] / total[2], total[1] / total[2]


def test_an_observer_that_is_the_teacher_proposes_its_states(mirror, batch, own):
    same = selecting(mirror, [0, 1, 2, 3])
    found = propose(*same, batch["tokens"][:, :-1], batch["split"])
    np.testing.assert_allclose(found.wkv, own[1].wkv, rtol=1e-5, atol=1e-6)


def test_a_map_of_another_place_moves_a_state_there(mirror, batch, own):
    swapped = selecting(mirror, [3, 2, 1, 0])
    found = propose(*swapped, batch["tokens"][:, :-1], batch["split"])
    np.testing.assert_allclose(found.wkv, own[1].wkv[::-1, :, ::-1], rtol=1e-5, atol=1e-6)


def test_a_proposal_is_the_mapped_state_of_the_row_read_alone(made, batch, proposed):
    found = propose(*made, batch["tokens"][:, :-1], batch["split"])
    np.testing.assert_allclose(found.wkv, proposed[1].wkv, rtol=1e-5, atol=1e-6)
    assert not found.att_shift.any() and not found.ffn_shift.any()


def test_before_anything_is_read_the_bias_is_proposed(made, batch):
    found = propose(*made, batch["tokens"][:, :-1], np.zeros(ROWS, np.int32))
    np.testing.assert_array_equal(found.wkv[:, 2], made[1]["bias"])


def test_token_shifts_have_the_teachers_activation_dtype(made):
    observer, params = made
    observer = dataclasses.replace(observer, teacher=dataclasses.replace(TEACHER, dtype="bfloat16"))
    proposed = jax.eval_shape(lambda p: propose(observer, p, jnp.zeros((1, 3), jnp.int32)), params)
    assert proposed.att_shift.dtype == jnp.bfloat16
    assert proposed.wkv.dtype == jnp.float32


def test_tokens_behind_the_split_do_not_move_the_proposal(made, batch):
    observer, params = made
    inputs = batch["tokens"][:, :-1]
    behind = np.arange(LENGTH)[None] >= batch["split"][:, None]
    other = np.where(behind, (inputs + 7) % 23, inputs)
    one, two = (propose(observer, params, x, batch["split"]).wkv for x in (inputs, other))
    np.testing.assert_array_equal(one, two)


def test_a_new_observer_proposes_states_of_about_the_size_of_its_own(mirror, batch, own):
    found = propose(*mirror, batch["tokens"][:, :-1], batch["split"])
    assert 0.3 < float(jnp.std(found.wkv) / jnp.std(own[1].wkv)) < 3


def test_every_part_of_an_observer_learns(result):
    _, gradients = result
    _, grads = gradients["loss"]
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("term", ["fvu", "answer_nats"])
def test_each_term_reaches_the_model_through_the_maps(term, result):
    _, gradients = result
    _, grads = gradients[term]
    for leaf in (grads["left"], grads["right"], grads["bias"], grads["model"]["emb"]["weight"]):
        assert np.abs(leaf).max() > 0


def test_the_divergence_moves_the_small_model_alone(result):
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


def test_states_are_compared_at_the_splits_as_of_rows_read_alone(own, proposed, result):
    wanted, came = (np.asarray(state.wkv, np.float64) for _, state in (own, proposed))
    variance = wanted.var(axis=1).mean(axis=(2, 3))
    error = np.square(came - wanted).mean(axis=(1, 3, 4))
    assert float(result[0]["fvu"]) == pytest.approx((error / variance).mean(), rel=1e-5)


def test_answers_are_those_of_rows_continued_alone(teacher, batch, proposed, result):
    nats, _ = by_rows(teacher, proposed[1], batch)
    assert float(result[0]["answer_nats"]) == pytest.approx(nats, rel=1e-5)


def test_the_divergence_is_the_mean_over_prompts(own, proposed, result):
    total = 0.0
    for base, tuned in zip(own[0], proposed[0], strict=True):
        base, tuned = jax.nn.log_softmax(base), jax.nn.log_softmax(tuned)
        total += float(jnp.sum(jnp.exp(base) * (base - tuned)))
    assert float(result[0]["divergence_nats"]) == pytest.approx(total / sum(SPLITS), rel=1e-5)


def test_models_of_other_widths_diverge_by_their_own_heads():
    x, base, head, other = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, 3, 4), (2, 3, 6), (5, 4), (5, 6)])
    )
    tuned, reference = jax.nn.log_softmax(x @ head.T), jax.nn.log_softmax(base @ other.T)
    wanted = jnp.sum(jnp.exp(reference) * (reference - tuned), -1)
    found = divergence(x, base, head, base_head=other, chunk=2)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_without_answers_what_is_behind_the_splits_has_no_influence(made, teacher, batch):
    loss = jax.jit(observer_loss(made[0], *teacher, answers=0.0))
    behind = np.arange(LENGTH + 1)[None] >= batch["split"][:, None]
    other = batch | {"tokens": np.where(behind, (batch["tokens"] + 7) % 23, batch["tokens"])}
    other |= {"mask": 1 - batch["mask"]}
    one, metrics = loss(made[1], batch)
    two, _ = loss(made[1], other)
    assert float(one) == float(two)
    assert set(metrics) == {"fvu", "divergence_nats", "loss_nats"}
    assert float(metrics["loss_nats"]) == float(one)


def test_masked_targets_and_those_in_the_prompt_do_not_count(step, made, batch, result):
    prompt = np.arange(LENGTH)[None] < batch["split"][:, None]
    other, _ = step(made[1], batch | {"mask": np.where(prompt, np.float32(5), batch["mask"])})
    assert float(other["answer_nats"]) == pytest.approx(float(result[0]["answer_nats"]), rel=1e-6)


def test_a_batch_without_answers_costs_nothing(step, made, batch):
    found, gradients = step(made[1], batch | {"mask": np.zeros_like(batch["mask"])})
    assert float(found["answer_nats"]) == 0.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_a_right_proposal_leaves_nothing_unexplained_and_the_mean_everything(own):
    wkv = own[1].wkv
    mean, variance = moments(wkv)
    assert float(unexplained(wkv, wkv, variance).max()) == 0.0
    constant = jnp.broadcast_to(mean[:, None], wkv.shape)
    assert float(unexplained(constant, wkv, variance).mean()) == pytest.approx(1.0, rel=1e-5)


def test_a_head_that_does_not_vary_is_no_infinite_loss(own):
    wkv = own[1].wkv.at[1, :, 0].set(0.25)
    found = unexplained(wkv + 1e-4, wkv, moments(wkv).variance)
    assert float(found.max()) < 10
    still = jnp.ones_like(wkv)
    assert not unexplained(still, still, moments(still).variance).any()


def test_moments_of_prompts_are_those_of_the_rows_states(teacher, batch, own):
    found = state_moments(*teacher, batch["tokens"][:, :-1], batch["split"])
    wkv = own[1].wkv
    np.testing.assert_allclose(found.mean, wkv.mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.variance, wkv.var(1).mean((2, 3)), rtol=1e-4)


def test_drift_is_the_unexplained_variance_row_by_row(made, teacher, batch, result):
    tokens, lengths = batch["tokens"][:, :-1], batch["split"]
    rows = drift(*made, *teacher, tokens, lengths=lengths)
    assert float(rows.mean()) == pytest.approx(float(result[0]["fvu"]), rel=1e-5)
    variance = np.asarray(state_moments(*teacher, tokens, lengths).variance)
    alone = drift(*made, *teacher, tokens[2:3, :9], variance=variance)
    assert float(alone[0]) == pytest.approx(float(rows[2]), rel=1e-4)


def test_the_handover_is_four_continuations(teacher, batch, own, proposed):
    found = handover(*teacher, proposed[1], batch)
    zero = init_state(TEACHER, ROWS)
    starts = {"zero": zero, "wkv": zero.replace(wkv=own[1].wkv), "own": own[1]}
    assert set(found) == {*starts, "proposed"}
    for name, start in (starts | {"proposed": proposed[1]}).items():
        nats, accuracy = by_rows(teacher, start, batch)
        assert found[name].nats == pytest.approx(nats, rel=1e-5), name
        assert found[name].accuracy == pytest.approx(accuracy, rel=1e-6), name


def test_one_start_state_is_handed_to_all_rows(teacher, batch):
    found = handover(*teacher, init_state(TEACHER), batch)
    assert found["proposed"] == found["zero"]


def test_a_tail_is_rolled_to_the_front():
    tokens = jnp.arange(10).reshape(2, 5)
    inputs, targets, shares = tails(tokens, jnp.array([1, 3]), jnp.ones((2, 4)))
    np.testing.assert_array_equal(inputs[0, :3], [1, 2, 3])
    np.testing.assert_array_equal(targets[0, :3], [2, 3, 4])
    assert (int(inputs[1, 0]), int(targets[1, 0])) == (8, 9)
    np.testing.assert_allclose(shares, [[0.25] * 3 + [0], [0.25, 0, 0, 0]])


def test_splits_depend_on_seed_and_step_alone(batch):
    one, two, three = (split_batch(batch, 1, step)["split"] for step in (5, 5, 6))
    np.testing.assert_array_equal(one, two)
    assert (one != three).any()
    many = {"tokens": np.zeros((400, LENGTH + 1), np.int32)}
    drawn = split_batch(many, 0, 0, least=2, most=5)["split"]
    assert set(drawn.tolist()) == {2, 3, 4, 5}
    assert set(split_batch(many, 0, 0)["split"].tolist()) == set(range(1, LENGTH))


def test_an_observer_survives_its_folder_bit_for_bit(made, teacher, tmp_path):
    observer, params = made
    params = params | {"left": params["left"].astype(jnp.bfloat16)}
    info = {"base_model": model_hash(teacher[1], TEACHER), "variance": [[0.1, 0.2], [0.3, 0.4]]}
    save_observer(tmp_path / "a" / "b", observer, params, info=info)
    found, loaded = load_observer(tmp_path / "a" / "b", TEACHER, base_model=info["base_model"])
    # Which implementation runs is the machine's choice, and not in the file.
    small = dataclasses.replace(SMALL, implementation=None)
    assert found == dataclasses.replace(observer, model=RWKV7(small))
    assert observer_info(tmp_path / "a" / "b") == info
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for one, two in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


def test_a_folder_of_another_teacher_is_refused(made, tmp_path):
    save_observer(tmp_path, *made, info={"base_model": "abc"})
    for change, sentence in (
        ({"num_layers": 3}, "`teacher` must have num_layers 2, as the observer's; got 3"),
        ({"vocab_size": 24}, "`teacher` must have vocab_size 23, as the observer's; got 24"),
        ({"head_size": 8}, "`teacher` must have head_size 16, as the observer's; got 8"),
    ):
        with pytest.raises(ValueError, match=f"load_observer: {sentence}"):
            load_observer(tmp_path, dataclasses.replace(TEACHER, **change))
    with pytest.raises(ValueError, match=r"belongs to abc; `base_model` is abd\."):
        load_observer(tmp_path, TEACHER, base_model="abd")


def test_a_damaged_folder_is_refused(made, tmp_path):
    observer, params = made
    with pytest.raises(ValueError, match=r"is no observer: it has no model\.safetensors"):
        load_observer(tmp_path, TEACHER)
    save_observer(tmp_path, observer, params)
    with pytest.raises(ValueError, match="does not say which teacher it belongs to"):
        load_observer(tmp_path, TEACHER, base_model="abc")
    maps = (tmp_path / MAPS).read_bytes()
    save_observer(tmp_path, observer, params | {"model": alive(params["model"], 9)})
    (tmp_path / MAPS).write_bytes(maps)
    with pytest.raises(ValueError, match=f"has {MODEL} of another {MAPS}"):
        load_observer(tmp_path, TEACHER)
    save_observer(tmp_path, observer, params | {"bias": params["bias"].at[0].set(jnp.nan)})
    with pytest.raises(ValueError, match="has NaN or Inf in bias"):
        load_observer(tmp_path, TEACHER)
    write_safetensors(tmp_path / MAPS, [("left", np.zeros(3))])
    with pytest.raises(ValueError, match="does not say that it is an observer's"):
        load_observer(tmp_path, TEACHER)


def test_other_vocabularies_and_sizes_are_refused(made, teacher):
    other = dataclasses.replace(TEACHER, vocab_size=24)
    with pytest.raises(ValueError, match=r"`model` must have the teacher's vocab_size 24; got 23"):
        init_observer(SMALL, other, jax.random.key(0))
    with pytest.raises(ValueError, match=r"init_observer: `bias` must have .*\(2, 2, 16, 16\)"):
        init_observer(SMALL, TEACHER, jax.random.key(0), bias=jnp.zeros((2, 2, 8, 8)))
    wide = dataclasses.replace(TEACHER, width=64)
    with pytest.raises(ValueError, match=r"observer_loss: `teacher` must have width 32.*got 64"):
        observer_loss(made[0], RWKV7(wide), teacher[1])


def test_weights_of_the_terms_are_checked(made, teacher):
    with pytest.raises(ValueError, match=r"observer_loss: `answers` must be at least 0; got -1"):
        observer_loss(made[0], *teacher, answers=-1.0)
    with pytest.raises(ValueError, match=r"one of variance, divergence, answers must be above 0"):
        observer_loss(made[0], *teacher, variance=0.0, divergence=0.0, answers=0.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"split": None}, r"`batch` must hold 'split'; it has tokens, mask"),
        ({"split": np.array([1, 2, 3], np.int32)}, r"`batch\['split'\]` must have one number .* 4"),
        ({"split": np.array([1, 2, 3, 14], np.int32)}, r".* between 0 and 13; got 14 in row 3"),
        ({"mask": np.ones((ROWS, LENGTH + 1), np.float32)}, r"`batch\['mask'\]` must have shape"),
        ({"tokens": np.full((ROWS, LENGTH + 1), 23, np.int32)}, r"`tokens` must be .* below 23"),
        (
            {"tokens": np.zeros((ROWS, 1), np.int32)},
            r"`batch\['tokens'\]` must be \[B T\+1\] with T at least 1",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(change, sentence, made, teacher, batch):
    batch = {name: part for name, part in (batch | change).items() if part is not None}
    with pytest.raises(ValueError, match=f"observer_loss: {sentence}"):
        observer_loss(made[0], *teacher)(made[1], batch)
    with pytest.raises(ValueError, match=f"handover: {sentence}"):
        handover(*teacher, init_state(TEACHER), batch)


def test_calls_that_do_not_fit_are_refused(made, teacher, batch):
    observer, params = made
    tokens = batch["tokens"]
    with pytest.raises(ValueError, match=r"propose: `params` must hold bias, left, model, right"):
        propose(observer, {"left": params["left"]}, tokens)
    with pytest.raises(ValueError, match=r"propose: `params\['left'\]` must have shape"):
        propose(observer, params | {"left": params["left"][:1]}, tokens)
    with pytest.raises(ValueError, match=r"propose: `lengths` must lie between 0 and 14; got 15"):
        propose(observer, params, tokens, np.array([1, 2, 15, 3]))
    with pytest.raises(ValueError, match="observer_loss: `batch` must have at least two rows"):
        row = {name: part[:1] for name, part in batch.items()}
        observer_loss(observer, *teacher)(params, row)
    with pytest.raises(ValueError, match="drift: `variance` must be given for one row"):
        drift(*made, *teacher, tokens[:1])
    with pytest.raises(ValueError, match=r"drift: `variance` must .* \(2, 2\); got \(2, 3\)"):
        drift(*made, *teacher, tokens, variance=jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"handover: `state.att_shift` must have shape"):
        handover(*teacher, repeat(init_state(TEACHER), 3), batch)
    with pytest.raises(ValueError, match=r"split_batch: `least` and `most` must be in order"):
        split_batch(batch, 0, 0, least=5, most=4)


def test_arguments_of_another_kind_are_refused(unchecked, made, batch):
    with pytest.raises(TypeError, match="Observer: `model` must be an RWKV7 and `teacher` an RWKV"):
        Observer(TEACHER, SMALL)
    with pytest.raises(TypeError, match="propose: `tokens` must be integers; got float32"):
        propose(*made, jnp.zeros((1, 2)))
    with pytest.raises(TypeError, match="propose: `lengths` must be integers; got float32"):
        propose(*made, batch["tokens"], jnp.zeros(ROWS))


def test_a_few_steps_down_the_gradient_lower_the_loss(step, made, batch, result):
    params = made[1]
    for _ in range(4):
        _, grads = step(params, batch)[1]["loss"]
        params = jax.tree.map(lambda leaf, grad: np.asarray(leaf) - 0.02 * grad, params, grads)
    assert float(step(params, batch)[0]["loss"]) < float(result[0]["loss"])


@pytest.mark.slow
def test_training_lowers_every_term_and_leaves_the_teacher_bit_equal(made, teacher, batch):
    before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), teacher[1])
    tx = optax.adam(1e-2)
    step, train = (
        make_train_step(observer_loss(made[0], *teacher), tx),
        TrainState.create(made[1], tx),
    )
    seen = []
    for _ in range(60):
        train, metrics = step(train, batch)
        seen.append(metrics)
    for name in ("loss", "fvu", "divergence_nats", "answer_nats"):
        assert float(seen[-1][name]) < 0.8 * float(seen[0][name]), name
    assert int(train.skipped) == 0
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, teacher[1]))
