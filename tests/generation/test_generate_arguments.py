"""What `generate` refuses, in one sentence each and before anything is compiled."""

import jax
import jax.numpy as jnp
import pytest

from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state

CONFIG = RWKV7Config(
    vocab_size=257, num_layers=2, width=32, head_size=16, implementation="scan"
)
MODEL = RWKV7(CONFIG)


class Spelling:
    """A tokenizer that is never asked."""

    def encode(self, text):
        raise NotImplementedError

    def token_bytes(self, token):
        raise NotImplementedError


@pytest.mark.parametrize(
    "prompts, choices, message",
    [
        (
            [1, 300],
            {},
            "generate: `prompts` must hold ids .* below 257; got 300 at position 1.",
        ),
        ([[1], [2, -1]], {}, "`prompts` row 1 must hold ids .* got -1 at position 1."),
        ([], {}, r"`prompts` must hold an id \(\[0\] begins a text\)"),
        ([[1], []], {}, "`prompts` row 1 must hold an id"),
        ([1], {"banned": range(257)}, "generate: `banned` must leave one id"),
        ([1], {"tokens": -1}, "`tokens` must be at least 0; got -1."),
        ([1], {"prefill_chunk": 0}, "`prefill_chunk` must be at least 1; got 0."),
        (
            [1],
            {"temperature": 1.0, "key": None},
            "`key` must be given unless `temperature` is 0",
        ),
        (
            [1],
            {"stop_strings": ["x"]},
            "`tokenizer` must be given with `stop_strings`; got None.",
        ),
        (
            [1],
            {"stop_strings": [""], "tokenizer": Spelling()},
            "must hold no empty string",
        ),
        (
            [1],
            {"stop_strings": ["ok", "a\ud83d"], "tokenizer": Spelling()},
            "generate: `stop_strings` must be valid Unicode; got a lone surrogate at chara",
        ),
        ([1], {"logits": jnp.zeros((2, 3))}, "`logits` must have shape"),
        (
            [],
            {"logits": jnp.zeros((2, 257)), "state": init_state(CONFIG, 3)},
            r"`logits` must have shape \(3, 257\); got \(2, 257\)",
        ),
        (
            [[1], [2]],
            {"state": init_state(CONFIG, 3)},
            "`state.att_shift` must have shape",
        ),
        (
            [[1], [2]],
            {"key": jax.random.split(jax.random.key(0), 3)},
            "`key` must be one key or 2",
        ),
    ],
)
def test_arguments_are_checked_before_anything_is_compiled(prompts, choices, message):
    with pytest.raises(ValueError, match=message) as caught:
        generate(MODEL, {}, prompts, **({"temperature": 0} | choices))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompts", ["text", b"bytes", [1.5], [True]])
def test_prompts_must_be_ids(prompts):
    with pytest.raises(TypeError, match="generate: `prompts` must"):
        generate(MODEL, {}, prompts, temperature=0)
