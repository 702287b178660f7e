"""Bits per byte, by hand and by position."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import random_params

from rwkv7_jax.config import RWKV7Config
from rwkv7_jax.evaluation import score, state_after, token_nats
from rwkv7_jax.loss import next_token_loss
from rwkv7_jax.model import RWKV7
from rwkv7_jax.state import init_state, repeat
from rwkv7_jax.tokenizer import Tokenizer

CONFIG = RWKV7Config(vocab_size=257, num_layers=2, width=32, head_size=16)
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


def test_bits_per_byte_is_the_loss_over_the_bytes(params, batch, result):
    loss, _ = next_token_loss(MODEL, params, repeat(init_state(CONFIG), 5), batch)
    # One of the 250 targets is the end of text: it costs bits and is no byte.
    assert result.bits_per_byte == pytest.approx(float(loss) / math.log(2) * 250 / 249, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)
    assert result.tokens == 250


def test_positions_add_up_to_the_whole(result):
    assert [(a, b) for a, b, _ in result.by_position] == [(0, 32), (32, 50)]
    bits = 5 * 32 - 1, 5 * 18
    total = sum(n * rate for n, (*_, rate) in zip(bits, result.by_position, strict=True))
    assert total == pytest.approx(result.bits_per_byte * 249, rel=1e-5)


def test_masked_targets_do_not_count(params, batch, result):
    mask = batch["mask"].copy()
    mask[:, 32:] = 0
    half = score(MODEL, params, init_state(CONFIG), batch | {"mask": mask}, Tokenizer.bytes())
    assert half.bits_per_byte == pytest.approx(result.by_position[0][2], rel=1e-6)


def test_the_number_of_rows_at_a_time_changes_nothing(params, batch):
    one = token_nats(MODEL, params, init_state(CONFIG), batch["tokens"], rows=2)
    two = token_nats(MODEL, params, init_state(CONFIG), batch["tokens"], rows=8)
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_a_prompt_read_in_pieces_is_the_prompt_read_at_once(params, batch):
    prompt = batch["tokens"][0]
    pieces = state_after(MODEL, params, prompt, chunk=20)
    whole = state_after(MODEL, params, prompt, chunk=64)
    np.testing.assert_allclose(pieces.wkv, whole.wkv, rtol=1e-4, atol=1e-4)
