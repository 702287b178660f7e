"""Laws of the engine: an answer equals that of `generate`, next to any other requests."""

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import engine_cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import (
    BYTES,
    CONFIG,
    MODEL,
    STATES,
    alone,
    answer,
    ask,
    assert_same,
    compiled_by,
    drawn_requests,
    drawn_state,
    work,
)
from tiny_models import lively

from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.serving.engine import Engine
from rwkv7_jax.serving.requests import Closed, Request, TooBusy, TooLong, UnknownState


def test_answers_equal_those_of_generate_next_to_other_requests(params, engine):
    requests = drawn_requests(14)
    asked = [ask(engine, request) for request in requests]
    work(engine)
    for request, (pieces, answers) in zip(requests, asked, strict=True):
        (only,) = answers
        assert "".join(piece.text for piece in pieces) == only.text
        assert only.prompt_tokens == len(request.prompt)
        assert_same(only, alone(params, request))
    # Requests of a kind are many enough for the comparison to say something.
    endings = [answers[0].ended for _, answers in asked]
    assert set(endings) == {"length", "stop_id", "stop_string"}


def model_scores(params, request, tokens):
    """The model's log-probabilities before each token, from one pass over all."""
    ids = jnp.asarray([[*request.prompt, *tokens]])
    state = STATES[request.state] if request.state else init_state(CONFIG)
    logits, _ = MODEL.apply({"params": params}, ids, state)
    return np.asarray(jax.nn.log_softmax(logits[0, len(request.prompt) - 1 : -1]))


def test_scores_are_the_models_own(params, engine):
    requests = drawn_requests(9, seed=5)
    requests = [
        dataclasses.replace(request, alternatives=(None, 0, 4)[index // 3])
        for index, request in enumerate(requests)
    ]
    asked = [ask(engine, request) for request in requests]
    work(engine)
    endings = set()
    for request, (pieces, (only,)) in zip(requests, asked, strict=True):
        assert only.tokens == tuple(alone(params, request).tokens[0])
        assert sum((piece.scores for piece in pieces), ()) == only.scores
        if request.alternatives is None:
            assert not only.scores
            continue
        endings.add(only.ended)
        # A stop string may have begun inside of a token, which then is another one.
        cut = only.ended == "stop_string"
        assert len(only.tokens) - len(only.scores) in ((0, 1) if cut else (0,))
        logps = model_scores(params, request, only.tokens)
        for score, token, expected in zip(
            only.scores, only.tokens, logps, strict=False
        ):
            assert score.id == token
            np.testing.assert_allclose(score.logp, expected[token], atol=2e-5)
            best = np.sort(expected)[::-1][: request.alternatives]
            np.testing.assert_allclose(
                [logp for _, logp in score.alternatives], best, atol=2e-5
            )
            np.testing.assert_allclose(
                [expected[id] for id, _ in score.alternatives], best, atol=2e-5
            )
    assert len(endings) > 1


def test_a_state_without_finite_logits_fails_alone(params):
    broken = drawn_state(3)
    broken = broken.replace(wkv=broken.wkv.at[0, 0, 0, 0, 0].set(jnp.nan))
    engine = Engine(MODEL, params, BYTES, STATES | {"broken": broken}, slots=2)
    request = Request((65, 66), state="poet", tokens=20, temperature=0.0)
    asked = [
        ask(engine, dataclasses.replace(request, state=name))
        for name in ("broken", "poet", "broken", "poet")
    ]
    work(engine)
    answers = [only for _, (only,) in asked]
    assert [a.ended == "failed" for a in answers] == [True, False, True, False]
    assert answers[0].error == "the model's logits are not finite"
    for index in (1, 3):
        assert_same(answers[index], alone(params, request))


@pytest.mark.parametrize("when", ["waiting", "reading", "decoding"])
def test_a_cancelled_request_leaves_no_trace(params, when):
    engine = Engine(MODEL, params, BYTES, STATES, slots=1)
    long = Request(tuple(range(1, 200)) * 3, state="judge", tokens=120, seed=0)
    _, answers = ask(engine, Request((65,), tokens=40)) if when == "waiting" else (0, 0)
    ended = []
    ticket = engine.submit(long, on_piece=lambda piece: None, on_end=ended.append)
    for _ in range({"waiting": 1, "reading": 1, "decoding": 5}[when]):
        engine.tick()
    ticket.cancel()
    engine.tick()
    assert [only.ended for only in ended] == ["cancelled"]
    assert bool(ended[0].tokens) == (when == "decoding")
    request = Request((67, 68), state="poet", tokens=12, seed=3)
    assert_same(answer(engine, request), alone(params, request))
    if when == "waiting":
        assert answers[0].ended == "length"


def test_a_row_samples_no_more_tokens_than_its_limit(engine, monkeypatch):
    ask(engine, Request((65,), tokens=3, temperature=0.0))
    ask(engine, Request((66,), tokens=11, temperature=0.0))
    seen = []
    decode = engine._slots.decode

    def note(limits, *, scored):
        drawn = decode(limits, scored=scored)
        seen.append([len(row.tokens) for row in drawn])
        return drawn

    monkeypatch.setattr(engine._slots, "decode", note)
    work(engine)
    assert seen == [[3, 8, 0], [0, 3, 0]]


def test_a_long_prompt_does_not_delay_other_requests(params):
    engine = Engine(MODEL, params, BYTES, STATES, slots=2)
    pieces, _ = ask(engine, Request((65,), tokens=64, temperature=0.0))
    ask(engine, Request((66,) * 1200, tokens=4))
    for tick in range(1, 5):
        engine.tick()
        text = "".join(piece.text for piece in pieces)
        assert len(text.encode("utf-8", "replace")) >= 8 * tick - 4
    work(engine)


def test_a_short_prompt_overtakes_a_long_one(engine):
    long, short = Request((66,) * 3000, tokens=4), Request((67,), tokens=4)
    _, of_long = ask(engine, long)
    _, of_short = ask(engine, short)
    for _ in range(2):
        engine.tick()
    assert of_short and not of_long
    work(engine)
    assert of_long


def test_a_request_whose_prefill_fails_gets_an_error(engine, monkeypatch):
    find = engine._cache.find
    monkeypatch.setattr(engine._cache, "find", lambda *_: 1 / 0)
    engine.start()
    done = threading.Event()
    ended = []
    engine.submit(
        Request((65, 66)),
        on_piece=ended.append,
        on_end=lambda answer: (ended.append(answer), done.set()),
    )
    assert done.wait(60)
    assert ended[0].error == "ZeroDivisionError: division by zero"
    monkeypatch.setattr(engine._cache, "find", find)
    engine.close()


def test_nothing_is_compiled_after_the_warm_up(params, engine):
    engine.warm_up()
    assert compiled_by(engine, drawn_requests(9, seed=5)) == []


def test_an_engine_of_short_answers_warms_up(params):
    short = Engine(
        MODEL, params, BYTES, {}, slots=1, longest_prompt=9, longest_answer=3
    )
    short.warm_up()
    assert len(answer(short, Request((65,), tokens=3, temperature=0.0)).tokens) <= 3


def test_after_an_error_all_rows_are_reset(params, engine, monkeypatch):
    decode = engine._slots.decode
    monkeypatch.setattr(engine._slots, "decode", lambda *_, **__: 1 / 0)
    engine.start()
    done = threading.Event()
    ended = []

    def end(answer):
        ended.append(answer)
        done.set()

    engine.submit(Request((65,)), on_piece=ended.append, on_end=end)
    assert done.wait(60)
    assert (ended[0].ended, ended[0].error) == (
        "failed",
        "ZeroDivisionError: division by zero",
    )
    monkeypatch.setattr(engine._slots, "decode", decode)
    done.clear()
    request = Request((67, 68), state="poet", tokens=12, seed=3)
    engine.submit(request, on_piece=lambda piece: None, on_end=end)
    assert done.wait(60)
    assert_same(ended[1], alone(params, request))
    engine.close()


@pytest.mark.parametrize("call", ["read", "take", "free", "decode"])
def test_an_engine_that_cannot_continue_ends_all_requests(engine, monkeypatch, call):
    monkeypatch.setattr(engine._slots, call, lambda *_, **__: 1 / 0)
    monkeypatch.setattr(engine._slots, "reset", lambda: [][0])
    asked = [ask(engine, Request((65, 66), tokens=1)) for _ in range(4)]
    with pytest.raises(IndexError):
        engine._run()
    assert [[only.ended for only in answers] for _, answers in asked] == [
        ["failed"]
    ] * 4
    assert engine.is_closed and isinstance(engine.failure, IndexError)
    with pytest.raises(Closed):
        ask(engine, Request((65,)))


def test_after_an_error_no_state_of_the_failed_call_is_used(engine, monkeypatch):
    """The device reports an error late, maybe after the states of the failed call were cached."""
    decode = engine._slots.decode
    failing = [True, False]

    def decode_or_fail(*args, **options):
        return 1 / 0 if failing.pop(0) else decode(*args, **options)

    monkeypatch.setattr(engine._slots, "decode", decode_or_fail)
    request = Request((65, 66, 67), tokens=1, temperature=0.0)
    ended = []

    def ask_again(answer):
        ended.append((answer.ended, answer.cached_tokens))
        if not failing:
            engine.close()
            return
        engine.submit(request, on_piece=lambda piece: None, on_end=ask_again)

    engine.submit(request, on_piece=lambda piece: None, on_end=ask_again)
    engine._run()
    assert ended == [("failed", 0), ("length", 0)]


def test_a_request_is_open_while_it_gets_its_row(engine, monkeypatch):
    """A server that shuts down ends its engine once no request is open."""
    take = engine._slots.take
    seen = []

    def note(*args, **options):
        seen.append((engine.has_work, engine.waiting))
        take(*args, **options)

    monkeypatch.setattr(engine._slots, "take", note)
    for _ in range(2):
        ask(engine, Request((65,), tokens=1, temperature=0.0))
    work(engine)
    assert seen == [(True, 2), (True, 1)]


@pytest.mark.parametrize("kind", [list, np.array, jnp.array])
def test_a_prompt_may_be_any_sequence_of_ids(engine, kind):
    expected = answer(engine, Request((65, 66, 67), tokens=4))
    prompt = kind([65, 66, 67])
    _, answers = ask(engine, Request(prompt, tokens=4))
    if kind is not jnp.array:
        # The engine has ids of its own.
        prompt[0] = 1
    work(engine)
    assert [only.tokens for only in answers] == [expected.tokens]


def test_an_answer_may_be_longer_than_an_integer_of_the_device(params):
    engine = Engine(MODEL, params, BYTES, {}, slots=3, longest_answer=2**40)
    request = Request((65,), tokens=2**40, stop_ids=tuple(range(257)))
    assert answer(engine, request).ended == "stop_id"


def test_an_engine_whose_ticks_all_fail_ends(engine, monkeypatch):
    """An engine that failed every request forever would look healthy."""
    decode = engine._slots.decode
    failing = [True, True, False, True, True, True]

    def decode_or_fail(*args, **options):
        return [][0] if failing.pop(0) else decode(*args, **options)

    monkeypatch.setattr(engine._slots, "decode", decode_or_fail)
    request = Request((65,), tokens=1, temperature=0.0)
    ended = []

    def ask_again(answer):
        ended.append(answer.ended)
        if failing:
            engine.submit(request, on_piece=lambda piece: None, on_end=ask_again)

    engine.submit(request, on_piece=lambda piece: None, on_end=ask_again)
    with pytest.raises(IndexError):
        engine._run()
    assert ended == ["failed"] * 2 + ["length"] + ["failed"] * 3
    assert engine.is_closed and isinstance(engine.failure, IndexError)


def test_an_engine_starts_only_once(engine):
    """Two threads would corrupt each other's rows."""
    engine.start()
    thread = engine._thread
    engine.start()
    assert engine._thread is thread
    for call in (engine.tick, engine.warm_up):
        with pytest.raises(
            RuntimeError, match=r"^Engine: `tick` and .* before `start`"
        ):
            call()
    assert not engine.has_work
    engine.close()
    with pytest.raises(Closed, match="create another one"):
        engine.start()


def test_an_engine_that_was_not_closed_ends_with_its_process(tmp_path):
    """A script or a notebook may end while requests decode."""
    script = tmp_path / "script.py"
    script.write_text(
        "import threading\n"
        "import engine_cases as cases\n"
        "from tiny_models import lively\n"
        "from rwkv7_jax.serving import Engine, Request\n"
        "engine = Engine(cases.MODEL, lively(cases.CONFIG), cases.BYTES, {}, slots=1)\n"
        "engine.start()\n"
        "begun = threading.Event()\n"
        "request = Request((65,), tokens=8000, temperature=1.0)\n"
        "engine.submit(\n"
        "    request, on_piece=lambda _: begun.set(), on_end=lambda end: print(end.ended)\n"
        ")\n"
        "assert begun.wait(120)\n"
    )
    support = Path(engine_cases.__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{support.parent.parent}:{support}"}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "cancelled\n"), done.stderr


def test_threads_are_answered_and_open_requests_are_cancelled_at_the_end(
    params, engine
):
    engine.start()
    requests = drawn_requests(8, seed=2)
    answers = [None] * 8
    done = [threading.Event() for _ in requests]

    def client(index):
        def end(answer):
            answers[index] = answer
            done[index].set()

        engine.submit(requests[index], on_piece=lambda piece: None, on_end=end)

    clients = [threading.Thread(target=client, args=(index,)) for index in range(8)]
    for thread in clients:
        thread.start()
    for event in done:
        assert event.wait(60)
    for request, only in zip(requests, answers, strict=True):
        assert_same(only, alone(params, request))
    _, late = ask(engine, Request((65,), tokens=8000, temperature=0.0))
    engine.close()
    assert [only.ended for only in late] == ["cancelled"]
    with pytest.raises(Closed):
        ask(engine, Request((65,)))


def test_a_failing_receiver_ends_only_its_own_answer(params, engine):
    def gone(piece):
        raise RuntimeError("the loop is closed")

    engine.submit(Request((65,), tokens=100), on_piece=gone, on_end=gone)
    request = Request((67, 68), state="poet", tokens=20, seed=3)
    assert_same(answer(engine, request), alone(params, request))


def test_requests_beyond_the_queue_limit_are_rejected(params):
    engine = Engine(MODEL, params, BYTES, {}, slots=1, queue=2)
    for _ in range(2):
        ask(engine, Request((65,), tokens=2))
    with pytest.raises(TooBusy, match="the queue is full"):
        ask(engine, Request((65,)))
    work(engine)
    assert answer(engine, Request((65,), tokens=2, temperature=0.0)).ended == "length"


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"state": "nobody"}, UnknownState, r"`state` .*\(poet, judge\); got 'nobody'"),
        (
            {"prompt": ()},
            ValueError,
            "the length of `prompt` must be at least 1; got 0",
        ),
        ({"prompt": (300,)}, ValueError, "`prompt` must hold ids .*300"),
        (
            {"prompt": (1,) * 65537},
            TooLong,
            "the length of `prompt` must be at most",
        ),
        ({"tokens": 0}, ValueError, "`tokens` must be at least 1; got 0"),
        ({"tokens": 9000}, ValueError, "`tokens` must be at most 8192; got 9000"),
        ({"tokens": 1.5}, TypeError, "`tokens` must be an integer; got float"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0; got -1"),
        ({"seed": 2**63}, ValueError, "`seed` must be at most"),
        ({"temperature": -1.0}, ValueError, "`temperature` must be from 0 to"),
        ({"top_p": 2.0}, ValueError, "`top_p` must be"),
        ({"stop_ids": (257,)}, ValueError, "`stop_ids` must hold ids .*257"),
        ({"stop_strings": ("",)}, ValueError, "`stop_strings`"),
    ],
)
def test_an_invalid_request_is_rejected_before_it_waits(
    engine, changes, error, sentence
):
    with pytest.raises(error, match=sentence):
        ask(engine, dataclasses.replace(Request((65,)), **changes))
    assert not engine.tick()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("Engine", lambda engine, params: Engine(MODEL, params, BYTES, {})),
        ("Engine", lambda engine, params: engine.warm_up()),
        ("Engine", lambda engine, params: engine.tick()),
        ("submit", lambda engine, params: ask(engine, Request((65,)))),
    ],
)
def test_calls_inside_interceptors_are_rejected(engine, params, name, call):
    def unchanged(next_fun, args, kwargs, context):
        return next_fun(*args, **kwargs)

    with (
        nn.intercept_methods(unchanged),
        pytest.raises(ValueError, match=f"^{name}: it must be called outside of flax"),
    ):
        call(engine, params)
    assert not engine.has_work


def test_a_tokenizer_has_all_ids_of_the_model():
    """A sampled id without a token would fail all requests."""
    config = dataclasses.replace(CONFIG, vocab_size=300)
    with pytest.raises(ValueError, match=r"^Engine: `tokenizer` .* 300 ids; got 257"):
        Engine(RWKV7(config), lively(config), BYTES, {})
    engine = Engine(
        RWKV7(config), lively(config), BYTES.with_vocab_size(300), {}, slots=1
    )
    request = Request((299,), tokens=60, temperature=1000.0)
    assert max(answer(engine, request).tokens) > 256


def test_something_other_than_a_tokenizer_is_rejected(params, unchecked):
    with pytest.raises(TypeError, match="Engine: `tokenizer` must be a Tokenizer"):
        Engine(MODEL, params, "bytes", {})
