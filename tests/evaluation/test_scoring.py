"""Bits per byte, restated and by position; the accuracy of answers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_checkpoints import random_params
from small_vocabularies import DIGITS, WORDS, byte_level_bpe, sentence_pieces

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.evaluation import scoring
from rwkv7_jax.evaluation.scoring import (
    frequency_nats,
    score,
    score_answers,
    token_nats,
)
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state, repeat
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabularies import load_vocabulary
from rwkv7_jax.training.losses import next_token_loss

# One layer compiles fastest.
CONFIG = RWKV7Config(
    vocab_size=257, num_layers=1, width=32, head_size=16, implementation="scan"
)
MODEL = RWKV7(CONFIG)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, dtype=jnp.float32)


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(1, 257, (5, 51)).astype(np.int32)
    tokens[1, 20] = 0
    return {"tokens": tokens, "mask": np.ones((5, 50), np.float32)}


@pytest.fixture(scope="module")
def result(params, batch):
    return score(MODEL, params, init_state(CONFIG), batch, Tokenizer.bytes())


def test_bits_per_byte_is_the_loss_per_byte(params, batch, result):
    state = repeat(init_state(CONFIG), 5)
    loss, _ = jax.jit(next_token_loss, static_argnums=0)(MODEL, params, state, batch)
    # One of the 250 targets is the end of text: it costs bits and is no byte.
    assert result.bits_per_byte == pytest.approx(
        float(loss) / math.log(2) * 250 / 249, rel=1e-5
    )
    assert result.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)
    assert result.tokens == 250


def test_losses_by_position_add_up_to_the_total(result):
    assert [(a, b) for a, b, _ in result.by_position] == [(0, 32), (32, 50)]
    bits = 5 * 32 - 1, 5 * 18
    total = sum(
        n * rate for n, (*_, rate) in zip(bits, result.by_position, strict=True)
    )
    assert total == pytest.approx(result.bits_per_byte * 249, rel=1e-5)


def test_the_last_range_of_positions_has_no_end(params, batch, result, monkeypatch):
    monkeypatch.setattr(scoring, "POSITIONS", (0, 16, 32))
    whole = score(MODEL, params, init_state(CONFIG), batch, Tokenizer.bytes())
    assert [(first, end) for first, end, _ in whole.by_position] == [
        (0, 16),
        (16, 32),
        (32, 50),
    ]
    assert whole.by_position[-1] == result.by_position[-1]


def test_a_range_of_positions_may_end_with_the_window(params, batch, monkeypatch):
    monkeypatch.setattr(scoring, "POSITIONS", (0, 50, 100))
    whole = score(MODEL, params, init_state(CONFIG), batch, Tokenizer.bytes())
    assert whole.by_position == ((0, 50, whole.bits_per_byte),)


def test_masked_targets_do_not_count(params, batch, result):
    mask = batch["mask"].copy()
    mask[:, 32:] = 0
    half = score(
        MODEL, params, init_state(CONFIG), batch | {"mask": mask}, Tokenizer.bytes()
    )
    assert half.bits_per_byte == pytest.approx(result.by_position[0][2], rel=1e-6)
    assert half.tokens == 160
    bits_per_token = half.bits_per_byte * 159 / 160
    assert half.perplexity == pytest.approx(2**bits_per_token, rel=1e-4)


def test_the_standard_error_is_that_of_a_ratio_of_sums(params, batch):
    # Windows of very different sizes, one of them without targets.
    mask = np.zeros((5, 50), np.float32)
    for row, size in enumerate((50, 3, 20, 0, 10)):
        mask[row, :size] = 1
    masked = batch | {"mask": mask}
    state = init_state(CONFIG)
    result = score(MODEL, params, state, masked, Tokenizer.bytes())
    bits = token_nats(MODEL, params, state, batch["tokens"]) * mask / math.log(2)
    sizes = mask * (batch["tokens"][:, 1:] > 0)
    rows = [0, 1, 2, 4]
    totals = bits.sum(1)[rows]
    weights = sizes.sum(1)[rows]
    residuals = totals - totals.sum() / weights.sum() * weights
    error = math.sqrt((residuals**2).sum() * 4 / 3) / weights.sum()
    assert result.standard_error == pytest.approx(error, rel=1e-4)
    assert len(result.by_window.weights) == 4


def test_a_single_window_has_no_standard_error(params, batch):
    one = {name: rows[:1] for name, rows in batch.items()}
    result = score(MODEL, params, init_state(CONFIG), one, Tokenizer.bytes())
    assert math.isnan(result.standard_error)


def test_a_difference_is_paired_by_window(params, batch, result):
    state = prefill_state(MODEL, params, batch["tokens"][0])
    other = score(MODEL, params, state, batch, Tokenizer.bytes())
    difference, error = other.difference(result)
    assert difference == pytest.approx(other.bits_per_byte - result.bits_per_byte)
    assert error > 0
    value, error = result.difference(result)
    assert value == error == 0


def test_the_batch_size_does_not_change_the_scores(params, batch):
    one = token_nats(MODEL, params, init_state(CONFIG), batch["tokens"], rows=2)
    two = token_nats(MODEL, params, init_state(CONFIG), batch["tokens"], rows=8)
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_chunked_prefill_gives_the_same_state(params, batch):
    prompt = batch["tokens"][0]
    pieces = prefill_state(MODEL, params, prompt, chunk=20)
    whole = prefill_state(MODEL, params, prompt, chunk=64)
    np.testing.assert_allclose(pieces.wkv, whole.wkv, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def likeliest(params, batch):
    """Return the most probable id at every target, and the target's loss."""
    tokens = jnp.asarray(batch["tokens"])
    logits, _ = MODEL.apply({"params": params}, tokens[:, :-1], init_state(CONFIG, 5))
    nats = -jnp.take_along_axis(
        jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1
    )[..., 0]
    return np.asarray(jnp.argmax(logits, axis=-1)), np.asarray(nats)


def test_accuracy_counts_correct_argmax_at_scored_positions(params, batch, likeliest):
    ids, nats = likeliest
    mask = np.zeros((5, 50), np.float32)
    mask[[0, 0, 0, 1, 3], [4, 9, 30, 9, 40]] = 1
    # The last input is never read, so its targets can be made right without changing what is read.
    mask[:4, 49] = 1
    tokens = batch["tokens"].copy()
    tokens[[0, 2, 3], 50] = ids[[0, 2, 3], 49]
    right = (ids == tokens[:, 1:]) & (mask > 0)
    got = score_answers(
        MODEL, params, init_state(CONFIG), {"tokens": tokens, "mask": mask}, rows=2
    )
    # One row is right wherever it is scored: at its last target.
    assert right.sum() >= 3 and mask[2].sum() == 1
    assert got.accuracy == pytest.approx(right.sum() / 9)
    assert got.by_row.weights.tolist() == mask.sum(1)[:4].tolist()
    assert got.by_row.value == pytest.approx(got.accuracy)
    exact = [right[row].sum() == mask[row].sum() for row in range(4)]
    assert got.exact == pytest.approx(np.mean(exact))
    assert got.by_position.shape == (50,)
    assert set(np.flatnonzero(~np.isnan(got.by_position))) == {4, 9, 30, 40, 49}
    assert got.by_position[49] == pytest.approx(right[:, 49].sum() / 4)
    earlier = {"tokens": tokens, "mask": mask * (np.arange(50) < 49)}
    nats = nats[earlier["mask"] > 0].mean()
    assert score_answers(
        MODEL, params, init_state(CONFIG), earlier
    ).nats == pytest.approx(nats, rel=1e-4)


def test_answers_start_from_the_state(params, batch):
    state = prefill_state(MODEL, params, batch["tokens"][0])
    zero, other = (
        score_answers(MODEL, params, s, batch).nats for s in (init_state(CONFIG), state)
    )
    assert zero != pytest.approx(other, rel=1e-4)


def test_a_batch_without_scored_positions_is_rejected(params, batch):
    with pytest.raises(
        ValueError, match=r"score_answers: `batch\.mask` must be nonzero for"
    ):
        score_answers(
            MODEL, params, init_state(CONFIG), batch | {"mask": batch["mask"] * 0}
        )


def test_token_bytes_are_cached_across_evaluations(params, batch, monkeypatch):
    calls = []
    tokenizer = Tokenizer.bytes()
    one = score(MODEL, params, init_state(CONFIG), batch, tokenizer)
    monkeypatch.setattr(
        Tokenizer, "token_bytes", lambda self, token: calls.append(token)
    )
    assert score(MODEL, params, init_state(CONFIG), batch, tokenizer) == one
    assert calls == []


@pytest.mark.parametrize("kind", ["digits", "words", "raw", "ids", "bpe", "pieces"])
def test_byte_counts_match_the_decoded_text(tmp_path, kind):
    texts = {
        "digits": "120,021#" * 9,
        "words": "abba ab\u20ac\n" * 9,
        "ids": "3 11,2\n" * 9,
    }
    text = texts.get(kind, "the cat caf\u00e9 \U0001f600\n" * 9)
    (tmp_path / "digits").write_text(DIGITS)
    (tmp_path / "words").write_text(WORDS)
    names = {"raw": "bytes256", "ids": "ids"}
    name = names.get(kind, str(tmp_path / kind))
    if kind in ("bpe", "pieces"):
        pytest.importorskip(
            "tokenizers", reason="the extra tokenizers is not installed"
        )
        write = byte_level_bpe if kind == "bpe" else sentence_pieces
        options = {} if kind == "bpe" else {"prefix": False}
        name = str(write(tmp_path / "json", **options))
    config = dataclasses.replace(CONFIG, vocab_size=700)
    params = random_params(config, dtype=jnp.float32)
    tokenizer = load_vocabulary(name, 700)
    ids = tokenizer.encode(text)
    if kind != "ids":
        assert tokenizer.decode(ids) == text
    tokens = np.array([ids], np.int32)
    batch = {"tokens": tokens, "mask": np.ones((1, len(ids) - 1), np.float32)}
    model = RWKV7(config)
    found = score(model, params, init_state(config), batch, tokenizer)
    nats = token_nats(model, params, init_state(config), tokens)
    size = len(tokenizer.decode_bytes(ids[1:]))
    expected = float(nats.sum()) / math.log(2) / size
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_out_of_vocabulary_ids_are_rejected(params, batch):
    with pytest.raises(
        ValueError, match="below the vocabulary size of `tokenizer`, 256; got 256"
    ):
        score(MODEL, params, init_state(CONFIG), batch, Tokenizer.bytes256())


@given(
    targets=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0])), min_size=1
    ),
    guesses=st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4),
)
def test_frequency_nats_bounds_every_context_free_guess(targets, guesses):
    tokens = np.array([[0, *(token for token, _ in targets)]], np.int32)
    mask = np.array([[weight for _, weight in targets]], np.float32)
    if not mask.sum():
        return
    losses = -np.log(np.array(guesses) / sum(guesses))[tokens[:, 1:]]
    guessed = np.sum(losses * mask) / mask.sum()
    assert frequency_nats(Batch(tokens=tokens, mask=mask)) <= guessed + 1e-6


def test_frequency_nats_is_the_entropy_of_the_targets():
    tokens = np.array([[9, 1, 1, 1, 2], [9, 5, 5, 5, 5]], np.int32)
    mask = np.array([[1, 1, 1, 1], [0, 0, 0, 0]], np.float32)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    found = frequency_nats(Batch(tokens=tokens, mask=mask))
    assert found == pytest.approx(expected)


def test_a_vocabulary_of_billions_of_ids_has_byte_counts():
    batch = Batch(tokens=np.array([[7, 30, 2]]), mask=np.array([[1.0, 0.5]]))
    sizes = scoring.target_bytes(batch, load_vocabulary("ids"))
    assert sizes.tolist() == [[3.0, 1.0]]


def test_no_rows_have_no_losses(params):
    with pytest.raises(
        ValueError, match=r"rows of at least two ids; got shape \(0, 5\)"
    ):
        token_nats(MODEL, params, init_state(CONFIG), np.zeros((0, 5), np.int32))
