"""Start states as adapters: what mixtures are, what is measured of a state, when advice appears."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, lively, random_state, restated, tokens

from rwkv7_jax import advice, pictures, upscaling
from rwkv7_jax.adapters import capacity, mix
from rwkv7_jax.diagnosis import diagnose, ranks, retention
from rwkv7_jax.evaluation import answers
from rwkv7_jax.model import RWKV7
from rwkv7_jax.state import Features, init_state, repeat
from rwkv7_jax.state_tuning import scaled, spectra, state_statistics

B, T, SIZE = 3, 13, 24
HEADS = (CONFIG.num_layers, CONFIG.num_heads)


@pytest.fixture(scope="module")
def model():
    return RWKV7(CONFIG)


@pytest.fixture(scope="module")
def params():
    return lively()


@pytest.fixture(scope="module")
def empty():
    """An upscaled state whose memory is empty, read through features that no text was needed for.

    Every test that runs the model takes such states, so that all share the compiled programs.
    """
    draws = np.random.default_rng(5).normal(size=(3, 1, 2, SIZE, 32))
    landmarks = jnp.asarray(draws / np.linalg.norm(draws, axis=-1, keepdims=True), jnp.float32)
    widths = jnp.ones((3, 1, 2, SIZE))
    identity = jnp.broadcast_to(jnp.eye(SIZE), (3, 1, 2, SIZE, SIZE))
    features = Features(landmarks=landmarks, widths=widths, mean=0.2 * widths, map=identity)
    return init_state(CONFIG).replace(upscaled=upscaling.empty(features))


def filled(state, seed=1, size=0.3):
    draws = np.random.default_rng(seed).normal(size=state.upscaled.memory.shape)
    memory = jnp.asarray(size * draws, jnp.float32)
    return state.replace(upscaled=state.upscaled.replace(memory=memory))


def text(seed=0, scored=T):
    mask = np.zeros((B, T), np.float32)
    mask[:, :scored] = 1
    return {"tokens": np.asarray(tokens(B, T + 1, seed=seed)), "mask": mask}


def equal(one, two):
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, two))


def test_a_mixture_of_one_is_the_state_itself(empty):
    for state in (random_state(), filled(empty)):
        assert equal(mix([state], [1.0]), state)


def test_an_interpolation_ends_at_its_states(empty):
    one, two = filled(empty, 1), filled(empty, 2)
    assert equal(mix([one, two], [1.0, 0.0]), one) and equal(mix([one, two], [0.0, 1.0]), two)


def test_mixtures_are_linear():
    one, two, three = (random_state(seed=seed) for seed in range(3))
    at_once = mix([one, two, three], [0.5, -0.25, 2.0])
    nested = mix([mix([one, two], [1.0, -0.5]), three], [0.5, 2.0])
    for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(nested), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_a_scaled_state_is_a_mixture_of_one(empty):
    for state in (random_state(), filled(empty)):
        assert equal(mix([state], [0.3]), scaled(state, 0.3))


def test_memories_are_mixed_and_their_features_stay(empty):
    one, two = filled(empty, 1), filled(empty, 2)
    mixed = mix([one, two], [0.5, 0.5]).upscaled
    wanted = 0.5 * (one.upscaled.memory + two.upscaled.memory)
    np.testing.assert_allclose(mixed.memory, wanted, rtol=1e-6, atol=1e-7)
    assert equal(mixed.features, empty.upscaled.features)


def with_upscaled(state, **changes):
    return state.replace(upscaled=state.upscaled.replace(**changes))


def with_features(state, **changes):
    return with_upscaled(state, features=state.upscaled.features.replace(**changes))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.replace(upscaled=None), r"`states\[1\]` must have an upscaled memory if and"),
        (lambda s: s.replace(wkv=s.wkv[:2]), r"`states\[1\].wkv` must have the shape of"),
        (lambda s: repeat(s, 2), r"`states\[1\]` must hold one sequence; got 2"),
        (lambda s: with_upscaled(s, dynamics="decay"), r"dynamics` must be .*static; got decay"),
        (lambda s: with_features(s, kind="fourier"), r"kind` must be .*gaussian; got fourier"),
        (
            lambda s: with_features(s, landmarks=s.upscaled.features.landmarks + 1),
            r"`states\[1\].upscaled.features.landmarks` must equal states\[0\]'s; it differs",
        ),
        (lambda s: with_features(s, map=None), r"features.map` must equal states\[0\]'s"),
        (
            lambda s: with_upscaled(s, memory=s.upscaled.memory[..., :-1]),
            r"`states\[1\].upscaled.memory` must be states\[0\]'s, \(3, 1, 2, 32, 24\)",
        ),
    ],
)
def test_states_that_do_not_fit_are_refused_by_name(empty, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        mix([empty, change(empty)], [0.5, 0.5])


@pytest.mark.parametrize(
    ("states", "weights", "sentence"),
    [
        (1, [], "got 0 weights and 1 states"),
        (0, [], "got 0 weights and 0 states"),
        (1, [float("nan")], "`weights` must be finite; got nan"),
    ],
)
def test_weights_are_one_a_state_and_finite(states, weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        mix([random_state()] * states, weights)


def test_capacity_counts_what_holds_something(empty):
    wkv, memory = 3 * 2 * 32 * 32, 3 * 2 * 32 * SIZE
    assert capacity(random_state()).trained == capacity(init_state(CONFIG)).trained == wkv
    assert capacity(empty).trained == capacity(filled(empty)).trained == memory
    both = capacity(filled(empty).replace(wkv=random_state().wkv))
    assert (both.wkv, both.memory, both.trained) == (wkv, memory, wkv + memory)
    assert both.facts == ((wkv + memory) // 35, (wkv + memory) // 20)


@pytest.fixture(scope="module")
def found(model, params, empty):
    """A full upscaled state on a text, of which the first ten targets count, and on another."""
    state = filled(empty).replace(wkv=random_state(seed=3).wkv)
    return state, diagnose(model, params, state, text(scored=10), generic=text(1))


@pytest.fixture(scope="module")
def bare(model, params, empty):
    """A WKV state with an empty memory beside it, which numpy restates without one."""
    state = empty.replace(wkv=0.3 * random_state(seed=3).wkv)
    return state, diagnose(model, params, state, text(scored=10))


def psi_of(params, state, ids):
    """The WKV state's psi [L T H N] token by token, float64, of a run from `state`."""
    _, _, trace = restated(params, ids, state.replace(upscaled=None))
    log_w, a, b, r = (trace[name] for name in ("log_w", "a", "b", "r"))
    layers, length, heads, size = r.shape
    start = np.broadcast_to(np.eye(size), (layers, heads, size, size))
    out = []
    for t in range(length):
        erased = np.einsum("lhvk,lhk->lhv", start, a[:, t])
        start = start * np.exp(log_w[:, t])[:, :, None] + erased[..., None] * b[:, t, :, None]
        out.append(np.einsum("lhvk,lhk->lhv", start, r[:, t]))
    return np.stack(out, 1)


def test_the_forgetting_curve_is_the_mean_square_of_psi_relative_to_the_first(params, bare):
    state, memory = bare[0], bare[1].memories["wkv"]
    psi = np.stack([psi_of(params, state, row[:-1]) for row in text()["tokens"]])
    squares = np.square(psi).sum(-1).mean((0, 1, 3))
    np.testing.assert_allclose(memory.fading, squares / squares[0], rtol=1e-3)
    below = np.flatnonzero(squares < 0.1 * squares[0])
    assert memory.faded == (below[0] if len(below) else None)


def test_a_static_memorys_reads_do_not_fade(found):
    _, diagnosis = found
    assert diagnosis.memories["memory"].fading.min() > 0.3


def test_ranks_are_those_of_the_statistics_that_tuning_uses(model, params, found):
    state, diagnosis = found
    statistics = state_statistics(model, params, leaves=("wkv", "memory"), rows=B)
    moments = jax.jit(statistics)(state, text(scored=10))
    for name, matrix in (("wkv", moments.wkv), ("memory", moments.upscaled.memory)):
        values = np.linalg.eigvalsh(np.asarray(matrix[:, 0], np.float64))
        rank = np.square(values.sum(-1)) / np.square(values).sum(-1)
        np.testing.assert_allclose(diagnosis.memories[name].read_rank, rank, rtol=1e-2)


def test_norms_and_ranks_are_those_of_the_singular_values(found):
    state, diagnosis = found
    values = spectra(state).astype(np.float64)
    memory = diagnosis.memories["wkv"]
    np.testing.assert_allclose(memory.norms, np.sqrt(np.square(values).sum(-1)), rtol=1e-4)
    rank = np.square(np.square(values).sum(-1)) / (values**4).sum(-1)
    np.testing.assert_allclose(memory.rank, rank, rtol=1e-4)
    np.testing.assert_allclose(ranks(state.wkv), rank, rtol=1e-4)
    assert not ranks(init_state(CONFIG).wkv).any()


def test_a_typical_state_is_the_base_models_behind_the_rows(params, bare):
    ends = [restated(params, row[:-1], init_state(CONFIG))[1].wkv for row in text()["tokens"]]
    squares = np.square(np.stack(ends)).sum((-2, -1)).mean(0)
    np.testing.assert_allclose(bare[1].memories["wkv"].typical, np.sqrt(squares), rtol=1e-3)


def test_losses_by_position_are_those_of_the_models_logits(params, bare):
    state, diagnosis = bare
    ids = text()["tokens"]
    for start, came in (
        (init_state(CONFIG), diagnosis.base_nats),
        (state.replace(upscaled=None), diagnosis.tuned_nats),
    ):
        logits = np.stack([restated(params, row[:-1], start)[0] for row in ids])
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats = -np.take_along_axis(logs, ids[:, 1:, None], axis=-1)[..., 0]
        np.testing.assert_allclose(came[:10], nats.mean(0)[:10], rtol=1e-3)
        assert np.isnan(came[10:]).all()


def test_the_zero_state_changes_nothing(model, params, empty):
    (kept,) = retention(model, params, empty, {"own": text(1)})
    assert abs(kept.divergence) < 1e-6 and kept.base_nats == pytest.approx(kept.tuned_nats)
    assert kept.base_accuracy == kept.tuned_accuracy and kept.tokens == B * T


def test_retention_has_a_row_a_text_with_the_numbers_of_evaluation(model, params, found):
    state, diagnosis = found
    texts = {"some": text(2, scored=5), "other": text(1)}
    rows = retention(model, params, state, texts)
    assert [row.name for row in rows] == ["some", "other"]
    for row, batch in zip(rows, texts.values(), strict=True):
        one, two = (answers(model, params, s, batch) for s in (init_state(CONFIG), state))
        wanted = [one.nats, two.nats, one.accuracy, two.accuracy]
        came = [row.base_nats, row.tuned_nats, row.base_accuracy, row.tuned_accuracy]
        np.testing.assert_allclose(came, wanted, rtol=1e-4)
        assert row.divergence > 1e-3
    assert diagnosis.generic.tuned_nats == pytest.approx(rows[1].tuned_nats)


def test_more_rows_than_fit_at_once_are_all_counted(model, params, bare):
    many = {name: np.concatenate([x, x, x]) for name, x in text().items()}
    one, two = (diagnose(model, params, bare[0], batch) for batch in (text(), many))
    assert two.own.tokens == 3 * one.own.tokens
    assert two.own.tuned_nats == pytest.approx(one.own.tuned_nats, rel=1e-5)
    for name in ("typical", "read_rank", "reads"):
        a, b = (getattr(found.memories["wkv"], name) for found in (one, two))
        np.testing.assert_allclose(a, b, rtol=1e-3)


def test_the_order_of_rows_changes_nothing(model, params, bare):
    mask = (np.arange(T) < np.arange(1, 13)[:, None]).astype(np.float32)
    rows = {"tokens": np.asarray(tokens(12, T + 1, seed=9)), "mask": mask}
    turned = {name: x[::-1] for name, x in rows.items()}
    one, two = (diagnose(model, params, bare[0], batch) for batch in (rows, turned))
    assert one.own.tuned_nats == pytest.approx(two.own.tuned_nats, rel=1e-6)
    for name in ("typical", "read_rank", "reads"):
        a, b = (getattr(found.memories["wkv"], name) for found in (one, two))
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_a_text_in_which_nothing_counts_is_refused(model, params):
    with pytest.raises(ValueError, match="`batch` must have a target that counts"):
        diagnose(model, params, init_state(CONFIG), text(scored=0))
    with pytest.raises(ValueError, match="retention: `other` must have a target that counts"):
        retention(model, params, init_state(CONFIG), {"other": text(scored=0)})


def test_another_models_state_is_refused(model, params):
    state = random_state()
    with pytest.raises(ValueError, match=r"diagnose: `state.wkv` must have shape"):
        diagnose(model, params, state.replace(wkv=state.wkv[:, :, :1]), text())


def test_a_state_that_drowns_what_is_read_is_called_large(model, params, bare):
    huge, small = (scaled(bare[0], size) for size in (1000.0, 0.01))
    said = [diagnose(model, params, state, text()).advice for state in (huge, small)]
    assert [any("times the norm" in line for line in lines) for lines in said] == [True, False]


# A diagnosis with nothing wrong, and what each advice takes.
WELL = advice.Memory(
    dynamics="recurrent",
    spectrum=np.ones((*HEADS, 32)),
    norms=np.ones(HEADS),
    typical=np.ones(HEADS),
    rank=np.ones(HEADS),
    read_rank=np.full(HEADS, 16.0),
    reads=np.ones((3, 20)),
    channels=32,
)
KEPT = advice.Kept("own", 2.0, 1.0, 0.5, 0.6, 0.1, 100)
GOOD = advice.Diagnosis(
    memories={"wkv": WELL},
    base_nats=np.full(20, 2.0),
    tuned_nats=np.ones(20),
    counts=np.full(20, 5.0),
    own=KEPT,
    generic=dataclasses.replace(KEPT, tuned_nats=2.05),
)
FADING = dataclasses.replace(WELL, reads=np.where(np.arange(20) < 9, 1.0, 0.09) * np.ones((3, 1)))
LATE = dataclasses.replace(WELL, reads=np.where(np.arange(20) < 10, 1.0, 0.09) * np.ones((3, 1)))
NARROW = dataclasses.replace(WELL, read_rank=np.full(HEADS, 7.9))
LASTING = dataclasses.replace(WELL, dynamics="static", typical=None)


def changed(**parts):
    return dataclasses.replace(GOOD, **parts)


def one_head(value):
    norms = np.ones(HEADS)
    norms[2, 1] = value
    return {"wkv": dataclasses.replace(WELL, norms=norms)}


@pytest.mark.parametrize(
    ("diagnosis", "words"),
    [
        (GOOD, []),
        (changed(generic=None), []),
        (changed(memories=one_head(5.1)), ["1 of 6 heads .* layer 2 head 1, 5 times.* alpha"]),
        (changed(memories=one_head(4.9)), []),
        (changed(generic=dataclasses.replace(KEPT, tuned_nats=2.11)), ["harder: 2.000.* anchor"]),
        (changed(generic=dataclasses.replace(KEPT, tuned_nats=2.09)), []),
        (changed(generic=dataclasses.replace(KEPT, base_nats=0.001, tuned_nats=0.005)), []),
        (changed(memories={"wkv": FADING}), ["at position 9 of 20 .* static upscaled memory"]),
        (changed(memories={"wkv": LATE}), []),
        (changed(memories={"wkv": FADING, "memory": LASTING}), []),
        (changed(memories={"wkv": dataclasses.replace(FADING, norms=np.zeros(HEADS))}), []),
        (changed(memories={"wkv": NARROW}), ["WKV state .* 7.9 of 32 .* decorrelated"]),
        (
            changed(memories={"wkv": WELL, "memory": dataclasses.replace(NARROW, typical=None)}),
            ["The upscaled memory is read through few directions"],
        ),
        (changed(own=dataclasses.replace(KEPT, tuned_nats=2.0)), ["does not help here: 2.000"]),
    ],
)
def test_advice_appears_when_and_only_when_its_condition_holds(diagnosis, words):
    said = advice.advise(diagnosis)
    assert len(said) == len(words), said
    for line, word in zip(said, words, strict=True):
        assert re.search(word, line), line


def test_a_diagnosis_becomes_a_picture(found, tmp_path):
    pytest.importorskip("matplotlib")
    pictures.diagnosis(tmp_path / "state.png", found[1])
    assert (tmp_path / "state.png").read_bytes().startswith(b"\x89PNG")
