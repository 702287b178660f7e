"""How each row of `generate` ended: by a stop id, by a stop string or at its length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import random_params

from rwkv7_jax.generation import sampling
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.generation.streaming import before_stop_string
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.text.tokenizer import Tokenizer

CONFIG = RWKV7Config(
    vocab_size=257, num_layers=2, width=32, head_size=16, implementation="scan"
)
MODEL = RWKV7(CONFIG)
PROMPTS = [[84, 105, 102], list(range(40, 54)), [9]]
# Many stop ids, so that rows end early and at different ones.
STOP_IDS = tuple(range(0, 257, 7))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, dtype=jnp.float32, scale=0.3)


@jax.jit
def draw_among_stop_ids(keys, steps, logits, occurrences, options):
    """Repeats the draw of each row's last step with every other id banned.

    The noise is that of the decode loop. So the most favoured of all ids, which was a stop id, is
    also the most favoured of the stop ids.
    """
    keys = jax.vmap(jax.random.fold_in)(keys, steps)
    options = options._replace(banned=~options.stops)
    penalized = sampling.apply_penalties(logits, occurrences, options)
    return sampling.sample_with_logp(keys, penalized, options)[0]


@jax.jit
def count(occurrences, token, options):
    return sampling.count(occurrences, token[None], options)


def occurrences_of(tokens, options):
    """Counts what one row generated, as the decode loop did."""
    occurrences = sampling.no_occurrences(1, CONFIG.vocab_size)
    for token in tokens:
        occurrences = count(occurrences, np.int32(token), options)
    return occurrences


def derived_stop_tokens(out, key, options):
    """Derives the stop ids from the keys and the last logits, without the decode loop's answer."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        key, jnp.arange(len(out.tokens))
    )
    steps = jnp.asarray([len(row) for row in out.tokens], jnp.int32)
    rows = [occurrences_of(tokens, options) for tokens in out.tokens]
    occurrences = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
    drawn = draw_among_stop_ids(keys, steps, out.logits, occurrences, options)
    pairs = zip(out.ended, drawn.tolist(), strict=True)
    return [stop if ending == "stop_id" else None for ending, stop in pairs]


@pytest.mark.parametrize("penalties", [(0.0, 0.0), (0.8, 1.5)])
@pytest.mark.parametrize("temperature", [0, 0.6, 1.0, 1.7])
def test_stop_ids_match_a_repeated_last_draw(params, temperature, penalties):
    choices = {
        "temperature": temperature,
        "presence_penalty": penalties[0],
        "frequency_penalty": penalties[1],
        "stop_ids": STOP_IDS,
    }
    options = sampling.make_options(CONFIG.vocab_size, **choices)
    endings = set()
    for seed in range(6):
        key = jax.random.key(seed)
        out = generate(MODEL, params, PROMPTS, tokens=8, key=key, **choices)
        assert out.stop_tokens == derived_stop_tokens(out, key, options)
        endings.update(out.ended)
    assert "stop_id" in endings and (temperature == 0 or "length" in endings)


def test_a_row_without_a_stop_id_ends_at_its_length(params):
    out = generate(MODEL, params, PROMPTS, tokens=8, temperature=0, stop_ids=())
    assert out.ended == ["length"] * 3 == out.finished
    assert out.stop_tokens == [None] * 3


def test_a_prompt_without_generated_tokens_ends_at_its_length(params):
    out = generate(MODEL, params, PROMPTS, tokens=0)
    assert out.ended == ["length"] * 3 and out.stop_tokens == [None] * 3


class Printable:
    """Spells every id as one printable character."""

    encode = Tokenizer.bytes().encode

    def token_bytes(self, token):
        return chr(33 + token % 90).encode()


def test_a_stop_string_precedes_a_later_stop_id(params):
    choices = {"tokens": 12, "key": jax.random.key(3), "tokenizer": Printable()}
    free = generate(MODEL, params, PROMPTS[0], stop_ids=(), **choices)
    stop_string = free.texts[0][3:5]
    later = free.tokens[0][6]
    assert later not in free.tokens[0][:6]
    out = generate(
        MODEL,
        params,
        PROMPTS[0],
        stop_ids=(later,),
        stop_strings=[stop_string],
        **choices,
    )
    assert out.ended == ["stop_string"] and out.finished == ["stop"]
    assert out.stop_tokens == [None]
    assert out.tokens[0] == free.tokens[0][: free.texts[0].index(stop_string)]


def test_the_reported_stop_id_does_not_depend_on_streaming(params):
    choices = {"tokens": 12, "key": jax.random.key(5), "stop_ids": STOP_IDS}
    plain = generate(MODEL, params, PROMPTS, **choices)
    watched = generate(
        MODEL,
        params,
        PROMPTS,
        tokenizer=Tokenizer.bytes(),
        on_text=lambda piece, row: None,
        **choices,
    )
    assert plain.stop_tokens == watched.stop_tokens
    assert np.count_nonzero([stop is not None for stop in plain.stop_tokens]) > 0


@jax.jit
def log_softmax_of(params, ids, temperature):
    logits, _ = MODEL.apply({"params": params}, ids[None], init_state(CONFIG))
    return jax.nn.log_softmax(logits[0] / temperature)


def log_probabilities(params, prompt, drawn, temperature):
    """Computes those of drawn ids by one pass of the model, without the decode loop."""
    # One length for all rows, compiled once; what comes later changes nothing.
    ids = np.zeros(32, np.int32)
    row = [*prompt, *drawn]
    ids[: len(row)] = row
    logp = np.asarray(log_softmax_of(params, ids, temperature))[len(prompt) - 1 :]
    return logp[np.arange(len(drawn)), drawn]


def test_drawn_tokens_include_the_stop_id_with_its_log_probability(params):
    out = generate(
        MODEL,
        params,
        PROMPTS,
        tokens=12,
        key=jax.random.key(1),
        temperature=0.7,
        stop_ids=STOP_IDS,
    )
    assert {"stop_id"} <= set(out.ended)
    for row, prompt in enumerate(PROMPTS):
        stop = out.stop_tokens[row]
        assert out.drawn[row] == out.tokens[row] + ([] if stop is None else [stop])
        expected = log_probabilities(params, prompt, out.drawn[row], 0.7)
        np.testing.assert_allclose(out.logps[row], expected, atol=2e-5)


def test_drawn_tokens_end_with_the_token_that_completes_a_stop_string(params):
    tokenizer = Tokenizer.bytes()
    choices = {"tokens": 40, "key": jax.random.key(3), "stop_ids": ()}
    free = generate(MODEL, params, PROMPTS, **choices)
    # A letter that each row writes somewhere after its beginning.
    stops = []
    for row in free.tokens:
        written = [tokenizer.decode_bytes([number]) for number in row[11:]]
        stops.append(next(one.decode() for one in written if one and one.isascii()))
    out = generate(
        MODEL, params, PROMPTS, stop_strings=stops, tokenizer=tokenizer, **choices
    )
    assert "stop_string" in out.ended
    for row, ending in enumerate(out.ended):
        drawn = out.drawn[row]
        assert drawn == free.tokens[row][: len(drawn)]
        assert len(out.logps[row]) == len(drawn)
        kept = before_stop_string(drawn, tokenizer, stops)
        assert kept == (out.tokens[row] if ending == "stop_string" else None)
        if kept is not None:
            assert tokenizer.decode(drawn[len(kept) :]) in stops
