"""The diagnosis of a state: reads, norms, ranks, losses by position, retention."""

import jax
import numpy as np
import pytest
from tiny_models import SCANNED as CONFIG
from tiny_models import lively, random_state, restated, tokens
from upscaled_states import empty_state, filled

from rwkv7_jax.evaluation.head_statistics import head_statistics
from rwkv7_jax.evaluation.scoring import score_answers
from rwkv7_jax.evaluation.state_diagnosis import diagnose, ranks, retention
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.reports import plots as pictures
from rwkv7_jax.tuning.read_statistics import state_statistics
from rwkv7_jax.tuning.state_arithmetic import scaled, singular_values

B, T = 3, 13


@pytest.fixture(scope="module")
def model():
    return RWKV7(CONFIG)


@pytest.fixture(scope="module")
def params():
    return lively()


@pytest.fixture(scope="module")
def empty():
    """An empty upscaled state; all tests share its shapes and so the compiled programs."""
    return empty_state()


def text(seed=0, scored=T):
    mask = np.zeros((B, T), np.float32)
    mask[:, :scored] = 1
    # Zeros at the end of a row outside the loss would be padding.
    ids = np.maximum(np.asarray(tokens(B, T + 1, seed=seed)), 1)
    return {"tokens": ids, "mask": mask}


@pytest.fixture(scope="module")
def found(model, params, empty):
    """A full upscaled state and its diagnosis on a text with ten scored targets and on another."""
    state = filled(empty).replace(wkv=random_state(seed=3).wkv)
    return state, diagnose(model, params, state, text(scored=10), generic=text(1))


@pytest.fixture(scope="module")
def bare(model, params, empty):
    """A WKV state with an empty memory, and its diagnosis; the NumPy restatement has no memory."""
    state = empty.replace(wkv=0.3 * random_state(seed=3).wkv)
    return state, diagnose(model, params, state, text(scored=10))


def psi_of(params, state, ids):
    """Return psi [L T H N] of the WKV state at each token of a run from `state`, in float64."""
    _, _, trace = restated(params, ids, state.replace(upscaled=None))
    log_w, a, b, r = (trace[name] for name in ("log_w", "a", "b", "r"))
    layers, length, heads, size = r.shape
    start = np.broadcast_to(np.eye(size), (layers, heads, size, size))
    out = []
    for t in range(length):
        erased = np.einsum("lhvk,lhk->lhv", start, a[:, t])
        start = (
            start * np.exp(log_w[:, t])[:, :, None]
            + erased[..., None] * b[:, t, :, None]
        )
        out.append(np.einsum("lhvk,lhk->lhv", start, r[:, t]))
    return np.stack(out, 1)


def test_the_forgetting_curve_is_the_relative_mean_square_of_psi(params, bare):
    state = bare[0]
    memory = bare[1].memories["wkv"]
    psi = np.stack([psi_of(params, state, row[:-1]) for row in text()["tokens"]])
    squares = np.square(psi).sum(-1).mean((0, 1, 3))
    np.testing.assert_allclose(memory.fading, squares / squares[0], rtol=1e-3)
    below = np.flatnonzero(squares < 0.1 * squares[0])
    assert memory.faded == (below[0] if len(below) else None)


def test_reads_of_a_static_memory_do_not_fade(found):
    _, diagnosis = found
    assert diagnosis.memories["memory"].fading.min() > 0.3


def test_read_ranks_match_the_statistics_of_tuning(model, params, found):
    state, diagnosis = found
    statistics = state_statistics(model, params, leaves=("wkv", "memory"), rows=B)
    moments = jax.jit(statistics)(state, text(scored=10))
    for name, matrix in (("wkv", moments.wkv), ("memory", moments.upscaled.memory)):
        values = np.linalg.eigvalsh(np.asarray(matrix[:, 0], np.float64))
        rank = np.square(values.sum(-1)) / np.square(values).sum(-1)
        np.testing.assert_allclose(diagnosis.memories[name].read_rank, rank, rtol=1e-2)


def test_norms_and_ranks_match_the_singular_values(found):
    state, diagnosis = found
    values = singular_values(state.wkv)
    memory = diagnosis.memories["wkv"]
    np.testing.assert_allclose(
        memory.norms, np.sqrt(np.square(values).sum(-1)), rtol=1e-4
    )
    rank = np.square(np.square(values).sum(-1)) / (values**4).sum(-1)
    np.testing.assert_allclose(memory.rank, rank, rtol=1e-4)
    np.testing.assert_allclose(ranks(state.wkv), rank, rtol=1e-4)
    assert not ranks(init_state(CONFIG).wkv).any()


def test_the_reference_norm_is_that_of_the_base_models_states(params, bare):
    ends = [
        restated(params, row[:-1], init_state(CONFIG))[1].wkv
        for row in text()["tokens"]
    ]
    squares = np.square(np.stack(ends)).sum((-2, -1)).mean(0)
    np.testing.assert_allclose(
        bare[1].memories["wkv"].reference_norm, np.sqrt(squares), rtol=1e-3
    )


def test_losses_by_position_match_the_logits(params, bare):
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
    assert abs(kept.divergence) < 1e-6 and kept.base_nats == pytest.approx(
        kept.tuned_nats
    )
    assert kept.base_accuracy == kept.tuned_accuracy and kept.tokens == B * T


def test_retention_has_a_row_per_text_that_matches_evaluation(model, params, found):
    state, diagnosis = found
    texts = {"some": text(2, scored=5), "other": text(1)}
    rows = retention(model, params, state, texts)
    assert [row.name for row in rows] == ["some", "other"]
    for row, batch in zip(rows, texts.values(), strict=True):
        one, two = (
            score_answers(model, params, s, batch) for s in (init_state(CONFIG), state)
        )
        wanted = [one.nats, two.nats, one.accuracy, two.accuracy]
        came = [row.base_nats, row.tuned_nats, row.base_accuracy, row.tuned_accuracy]
        np.testing.assert_allclose(came, wanted, rtol=1e-4)
        assert row.divergence > 1e-3
    assert diagnosis.generic.tuned_nats == pytest.approx(rows[1].tuned_nats)


def test_rows_beyond_one_batch_are_all_counted(model, params, bare):
    many = {name: np.concatenate([x, x, x]) for name, x in text().items()}
    one, two = (diagnose(model, params, bare[0], batch) for batch in (text(), many))
    assert two.own.tokens == 3 * one.own.tokens
    assert two.own.tuned_nats == pytest.approx(one.own.tuned_nats, rel=1e-5)
    for name in ("reference_norm", "read_rank", "reads"):
        a, b = (getattr(found.memories["wkv"], name) for found in (one, two))
        np.testing.assert_allclose(a, b, rtol=1e-3)


def test_the_order_of_rows_does_not_matter(model, params, bare):
    mask = (np.arange(T) < np.arange(1, 13)[:, None]).astype(np.float32)
    rows = {"tokens": np.asarray(tokens(12, T + 1, seed=9)), "mask": mask}
    turned = {name: x[::-1] for name, x in rows.items()}
    one, two = (diagnose(model, params, bare[0], batch) for batch in (rows, turned))
    assert one.own.tuned_nats == pytest.approx(two.own.tuned_nats, rel=1e-6)
    for name in ("reference_norm", "read_rank", "reads"):
        a, b = (getattr(found.memories["wkv"], name) for found in (one, two))
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_a_text_without_scored_targets_is_rejected(model, params):
    with pytest.raises(
        ValueError, match=r"diagnose: `batch\.mask` must be nonzero for"
    ):
        diagnose(model, params, init_state(CONFIG), text(scored=0))
    with pytest.raises(
        ValueError, match=r"retention: `batches\['other'\]\.mask` must be nonzero"
    ):
        retention(model, params, init_state(CONFIG), {"other": text(scored=0)})


def test_a_state_of_another_model_is_rejected(model, params):
    state = random_state()
    with pytest.raises(ValueError, match=r"diagnose: `state.wkv` must have shape"):
        diagnose(model, params, state.replace(wkv=state.wkv[:, :, :1]), text())


def test_the_advice_warns_of_an_oversized_state(model, params, bare):
    huge, small = (scaled(bare[0], size) for size in (1000.0, 0.01))
    said = [diagnose(model, params, state, text()).advice for state in (huge, small)]
    assert [
        any("that of a state made by reading" in line for line in lines)
        for lines in said
    ] == [
        True,
        False,
    ]


def test_a_diagnosis_can_be_plotted(found, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    pictures.diagnosis(tmp_path / "state.png", found[1])
    assert (tmp_path / "state.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_rejected(model, params, number):
    state = init_state(CONFIG)
    state = state.replace(wkv=state.wkv.at[1, 0, 0, 0, 0].set(number))
    with pytest.raises(ValueError, match=r"^diagnose: `state` must be finite"):
        diagnose(model, params, state, text())
    with pytest.raises(ValueError, match=r"^head_statistics: `state` must be finite"):
        head_statistics(state)
    with pytest.raises(ValueError, match=r"^ranks: `memory` must be finite"):
        ranks(state.wkv)


def test_padding_is_not_read(model, params, bare):
    """Rows of 7 tokens have the same measurements with and without padding."""
    short = {"tokens": text()["tokens"][:, :8].copy(), "mask": np.ones((B, 7))}
    # The last row has 6 tokens.
    short["tokens"][:, -1] = 5
    short["tokens"][-1, 6:] = 0, 0
    short["mask"][-1, 5:] = 0
    padded = {name: np.pad(x, ((0, 0), (0, T - 7))) for name, x in short.items()}
    one, two = (diagnose(model, params, bare[0], rows) for rows in (short, padded))
    memories = [found.memories["wkv"] for found in (one, two)]
    for name in ("reference_norm", "read_rank"):
        np.testing.assert_allclose(*(getattr(one, name) for one in memories), rtol=1e-4)
    np.testing.assert_allclose(
        memories[0].reads, memories[1].reads[:, :7], rtol=1e-4, equal_nan=False
    )
    assert np.isnan(memories[1].reads[:, 7:]).all()
    assert one.advice == two.advice
    assert memories[0].faded == memories[1].faded
