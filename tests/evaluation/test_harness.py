"""Tasks of lm-evaluation-harness: scores match one forward pass, contexts are prefilled once."""

import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import lively, random_state

from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.text.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: rwkv7_jax[harness]")

from rwkv7_jax.evaluation.harness import StateLM

CONFIG = RWKV7Config(
    vocab_size=257, num_layers=1, width=32, head_size=16, implementation="scan"
)
MODEL = RWKV7(CONFIG)
BYTES = Tokenizer.bytes()
PAIRS = [
    ("The sea is deep", " and cold"),
    ("The sea is deep", " and the night is long over it"),
    ("The sea is wide ", "open"),
    ("", "A beginning"),
    ("   ", "after blanks"),
    ("x", "y"),
]
EXAMPLES = "Q: 1+1\nA: 2\n\nQ: 2+3\nA: 5\n\nQ: "


@pytest.fixture(scope="module")
def params():
    return lively(CONFIG)


@pytest.fixture(scope="module")
def tuned():
    return random_state(CONFIG)


def request(*args, task="task"):
    """Make a request as the harness does."""
    return types.SimpleNamespace(args=args, task_name=task)


@jax.jit
def _logits(params, state, tokens):
    return MODEL.apply({"params": params}, tokens, state)[0]


def direct(params, state, context, continuation):
    """Score with one forward pass over all tokens, without caches, masks or batches."""
    ids = [*context, *continuation]
    # One width for all: what follows a token does not change its score.
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(ids)] = ids
    logits = np.asarray(_logits(params, state, tokens)[0], np.float64)
    value = 0.0
    greedy = True
    for place, wanted in enumerate(continuation, len(context) - 1):
        row = logits[place]
        value += row[wanted] - np.logaddexp.reduce(row)
        greedy &= bool(row.argmax() == wanted)
    return value, greedy


def expected_ids(pair, bos):
    """Restate how a pair is split into ids of context and continuation."""
    context, continuation = pair
    blanks = context[len(context.rstrip()) :]
    before = [*bos, *BYTES.encode(context.rstrip())]
    return before or [0], BYTES.encode(blanks + continuation)


@pytest.mark.parametrize("bos", [(), (0,), (7, 0)])
@pytest.mark.parametrize("is_tuned", [False, True])
def test_scores_match_a_single_forward_pass(params, tuned, is_tuned, bos):
    state = tuned if is_tuned else None
    lm = StateLM(MODEL, params, BYTES, state, rows=4, bos=bos)
    pairs = list(PAIRS)
    # A continuation that greedy decoding gives, so that both flags occur.
    start = [*bos, *BYTES.encode("The sea is deep")]
    best = generate(
        MODEL, params, start, state, tokens=1, temperature=0.0, stop_ids=()
    ).tokens[0]
    best_text = BYTES.decode_bytes(best).decode("latin-1")
    if best_text.isascii():
        pairs.append(("The sea is deep", best_text))
    found = lm.loglikelihood([request(*pair) for pair in pairs])
    start_state = tuned if is_tuned else init_state(CONFIG)
    for pair, (value, greedy) in zip(pairs, found, strict=True):
        wanted, wanted_greedy = direct(params, start_state, *expected_ids(pair, bos))
        assert value == pytest.approx(wanted, abs=1e-5 * max(1, abs(wanted)))
        assert greedy == wanted_greedy
    assert lm.split_pairs == 0


def test_each_distinct_context_is_prefilled_once(params):
    lm = StateLM(MODEL, params, BYTES, rows=4)
    contexts = [f"Question {number}: who?" for number in range(5)]
    requests = []
    for context in contexts:
        requests += [request(context, " me"), request(context, " you")]
    lm.loglikelihood(requests)
    shared = len("Question ")
    each = len(contexts[0]) - shared
    assert lm.tokens_read == shared + 5 * each
    assert lm.tokens_read <= sum(len(one.args[0]) for one in requests) / 2


def test_the_shared_prefix_of_each_task_is_prefilled_once(params):
    lm = StateLM(MODEL, params, BYTES, rows=4)
    one = [request(EXAMPLES + str(n), " 2", task="one") for n in range(3)]
    two = [request("Other " + EXAMPLES + str(n), " 2", task="two") for n in range(3)]
    lm.loglikelihood([*one, *two])
    assert lm.tokens_read == len(EXAMPLES) + 3 + len("Other " + EXAMPLES) + 3


def test_a_text_of_any_length_is_scored_in_one_pass(params, tuned):
    text = "The night is long. " * 40
    lm = StateLM(MODEL, params, BYTES, tuned, rows=2)
    (value,) = lm.loglikelihood_rolling([request(text)])
    ids = BYTES.encode(text)
    logits = _logits(params, tuned, np.array([[0, *ids[:-1]]], np.int32))
    logp = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)), np.float64)
    wanted = logp[np.arange(len(ids)), ids].sum()
    assert value == pytest.approx(wanted, rel=1e-6)
    # Only what stands for the beginning is a context.
    assert lm.tokens_read == 1


def test_answers_match_generate_row_by_row(params, tuned):
    lm = StateLM(MODEL, params, BYTES, tuned, rows=4)
    contexts = ["Q: one", "Q: two and more", "Q: three", "Q: one", ""]
    greedy = {"until": ["\n\n", "e"], "do_sample": False, "max_gen_toks": 12}
    answers = lm.generate_until([request(context, greedy) for context in contexts])
    for context, answer in zip(contexts, answers, strict=True):
        alone = generate(
            MODEL,
            params,
            BYTES.encode(context) or [0],
            tuned,
            tokens=12,
            temperature=0.0,
            stop_strings=["\n\n", "e"],
            tokenizer=BYTES,
        )
        assert alone.texts is not None
        assert answer == alone.texts[0]
        assert "e" not in answer
    read = "Q: one", "Q: two and more", "Q: three"
    assert lm.tokens_read == 1 + sum(map(len, read))


def test_finished_requests_are_counted_over_the_tasks_of_a_call(params):
    lm = StateLM(MODEL, params, BYTES, rows=4)
    done = []
    lm.on_progress = lambda *shape: done.append(shape)

    def shares(call, requests):
        done.clear()
        call(requests)
        return list(done)

    scored = [request(*PAIRS[number % 6], task=number % 2) for number in range(12)]
    counted = shares(lm.loglikelihood, scored)
    assert counted[-1] == (12, 12) and counted == sorted(counted) and len(counted) > 2
    assert shares(lm.score_pairs, PAIRS)[-1] == (6, 6)
    assert shares(lm.loglikelihood_rolling, [request("a")] * 2)[-1] == (2, 2)
    greedy = {"until": [], "do_sample": False, "max_gen_toks": 2}
    asked = [request(f"{number % 6}", greedy, task=number % 2) for number in range(12)]
    # Equal questions are answered once.
    assert shares(lm.generate_until, asked) == [(6, 12), (12, 12)]


def test_sampled_answers_differ_and_are_reproducible(params):
    drawn = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    requests = [request("Q: one", drawn), request("Q: one", drawn)]
    first = StateLM(MODEL, params, BYTES, rows=4).generate_until(requests)
    second = StateLM(MODEL, params, BYTES, rows=4).generate_until(requests)
    assert first[0] != first[1]
    assert first == second
    # Each option leaves only the most likely token.
    greedy = request("Q: one", {"until": [], "do_sample": False})
    # The task sets no limit.
    lm = StateLM(MODEL, params, BYTES, rows=4, max_tokens=12)
    (wanted,) = lm.generate_until([greedy])
    for option in ({"top_k": 1}, {"top_p": 1e-6}):
        answers = lm.generate_until([request("Q: one", drawn | option)] * 2)
        assert answers == [wanted, wanted]


def test_results_reach_the_cache_and_each_task_shares_its_own_prefix(params):
    lm = StateLM(MODEL, params, BYTES, rows=4)
    stored = []
    lm.cache_hook = types.SimpleNamespace(
        add_partial=lambda kind, arguments, result: stored.append(
            (kind, arguments, result)
        )
    )
    scored = [request(*pair) for pair in PAIRS[:2]]
    scores = lm.loglikelihood(scored)
    assert stored == [
        ("loglikelihood", one.args, score)
        for one, score in zip(scored, scores, strict=True)
    ]
    stored.clear()
    lm.tokens_read = 0
    options = {"until": [], "do_sample": False, "max_gen_toks": 12}
    asked = []
    for task in ("one", "two"):
        for number in range(2):
            context = f"Of task {task}: {number}"
            asked.append(request(context, options, task=task))
    texts = lm.generate_until(asked)
    assert stored == [
        ("generate_until", one.args, text)
        for one, text in zip(asked, texts, strict=True)
    ]
    assert lm.tokens_read == 2 * (len("Of task one: ") + 2)


def test_an_unsupported_sampling_option_is_rejected(params):
    lm = StateLM(MODEL, params, BYTES)
    with pytest.raises(
        ValueError, match=r"a task's options must be .*; got `num_beams`"
    ):
        lm.generate_until([request("Q", {"until": ["\n"], "num_beams": 3})])


def test_tokens_across_the_context_border_are_split_and_counted(params):
    entries = {byte + 1: bytes([byte]) for byte in range(255)} | {256: b"ab"}
    pairs = Tokenizer(entries, vocab_size=257, name="pairs")
    lm = StateLM(MODEL, params, pairs, rows=4)
    found = lm.loglikelihood([request("xa", "b")])
    wanted = direct(params, init_state(CONFIG), pairs.encode("xa"), pairs.encode("b"))
    assert lm.split_pairs == 1
    assert found[0][0] == pytest.approx(wanted[0], abs=1e-5)


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"rows": 0}, ValueError, r"StateLM: `rows` must be"),
        ({"max_tokens": 0}, ValueError, r"StateLM: `max_tokens` must be"),
        ({"bos": (257,)}, ValueError, r"StateLM: `bos`"),
        ({"bos": "0"}, TypeError, r"StateLM: `bos` must be a list of ids; got str"),
        ({"state": 3}, TypeError, r"StateLM: `state`"),
        ({"tokenizer": None}, TypeError, r"StateLM: `tokenizer` must be a Tokenizer"),
    ],
)
def test_an_invalid_argument_is_rejected(unchecked, params, changed, error, sentence):
    arguments = {"tokenizer": BYTES, **changed}
    with pytest.raises(error, match=sentence):
        StateLM(MODEL, params, **arguments)


def test_a_uniform_model_scores_log_vocabulary_size_per_token(params):
    silent = {**params, "head": {"weight": jnp.zeros_like(params["head"]["weight"])}}
    lm = StateLM(MODEL, silent, BYTES, rows=4)
    ((value, _),) = lm.loglikelihood([request("a", "bcd")])
    assert value == pytest.approx(-3 * math.log(257), rel=1e-6)


def unchanged(next_fun, args, kwargs, context):
    """An interceptor that changes nothing."""
    del context
    return next_fun(*args, **kwargs)


@pytest.mark.parametrize(
    "call",
    [
        lambda lm: lm.loglikelihood([request("a", " b")]),
        lambda lm: lm.loglikelihood_rolling([request("a text")]),
        lambda lm: lm.generate_until([request("a", {"until": ["."]})]),
        lambda lm: StateLM(MODEL, lively(CONFIG), BYTES),
    ],
    ids=["loglikelihood", "loglikelihood_rolling", "generate_until", "StateLM"],
)
def test_calls_inside_interceptors_are_rejected(params, call):
    lm = StateLM(MODEL, params, BYTES)
    with (
        nn.intercept_methods(unchanged),
        pytest.raises(ValueError, match=r"^StateLM: it must be called outside of flax"),
    ):
        call(lm)
    assert lm.tokens_read == 0
