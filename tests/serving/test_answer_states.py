"""After an answer, however it ended, the next turn of the conversation reads what is new alone."""

import dataclasses
import itertools

import engine_cases
import jax
import pytest
from engine_cases import MODEL, STATES, alone, answer, assert_same
from tolerances import SAME, assert_trees_close

from rwkv7_jax.generation.decode_loop import prefill_rows
from rwkv7_jax.serving.engine import Engine
from rwkv7_jax.serving.requests import Request
from rwkv7_jax.text.tokenizer import Tokenizer

LETTERS = "abcdefghijklmno"

NEW = (33, 34, 35)


@pytest.fixture(scope="module")
def letters():
    """A vocabulary of letters and pairs of letters, so that stop strings begin inside tokens."""
    pairs = map("".join, itertools.product(LETTERS, LETTERS))
    words = [*LETTERS, *pairs]
    entries = {id: word.encode() for id, word in enumerate(words, 1)}
    return Tokenizer(entries, vocab_size=257, name="letters")


def assert_next_turn_reads_what_is_new(params, engine, request, said):
    """The state that was kept is that of the answer's tokens, and answers stay the same."""
    ids = (*request.prompt, *said.tokens)
    start = engine._start(request.state)
    kept = engine._cache.find(start.key, ids)
    assert kept.length == len(ids)
    fresh = prefill_rows(MODEL, params, start.state, [ids], chunk=256)
    assert_trees_close(kept.state, fresh, SAME["model"])
    following = dataclasses.replace(request, prompt=(*ids, *NEW), tokens=4)
    again = answer(engine, following)
    # The last token is read by the row.
    assert again.prompt_tokens - again.cached_tokens <= len(NEW)
    assert_same(again, alone(params, following))


@pytest.mark.parametrize("length", [1, 3, 6, 33, 70])
def test_an_answer_that_a_stop_string_ended_is_not_read_again(
    params, letters, monkeypatch, length
):
    """However many blocks the stop string lies in, and where in a block or a token it begins."""
    monkeypatch.setattr(engine_cases, "BYTES", letters)
    engine = Engine(MODEL, params, letters, STATES, slots=2)
    free = Request((70, 71), state="poet", tokens=64, seed=5, temperature=1.0)
    text = alone(params, free).texts[0]
    for begin in range(10, 27):
        stop = text[begin : begin + length]
        request = dataclasses.replace(free, stop_strings=(stop,))
        said = answer(engine, request)
        assert said.ended == "stop_string"
        assert_next_turn_reads_what_is_new(params, engine, request, said)


def test_an_answer_that_a_stop_id_of_the_request_ended_is_not_read_again(
    params, engine
):
    free = Request((70, 71), state="poet", tokens=24, temperature=0.0)
    for id in dict.fromkeys(alone(params, free).tokens[0]):
        request = dataclasses.replace(free, stop_ids=(id,))
        said = answer(engine, request)
        assert said.ended == "stop_id"
        assert_next_turn_reads_what_is_new(params, engine, request, said)


def test_requests_that_end_together_keep_their_own_states(params, letters, monkeypatch):
    monkeypatch.setattr(engine_cases, "BYTES", letters)
    engine = Engine(MODEL, params, letters, STATES, slots=3)
    requests = []
    for seed, state in enumerate((None, "poet", "judge")):
        free = Request((70 + seed,), state=state, tokens=40, seed=seed)
        text = alone(params, free).texts[0]
        stop = (text[20 + seed : 25 + seed],)
        requests.append(dataclasses.replace(free, stop_strings=stop))
    asked = [engine_cases.ask(engine, request) for request in requests]
    engine_cases.work(engine)
    for request, (_, (said,)) in zip(requests, asked, strict=True):
        assert said.ended == "stop_string"
        assert_next_turn_reads_what_is_new(params, engine, request, said)


def test_without_a_cache_no_state_is_copied(params, monkeypatch):
    copied = []
    monkeypatch.setattr(
        "rwkv7_jax.serving.answer_states.row_state", lambda *_: copied.append(1)
    )
    engine = Engine(MODEL, params, Tokenizer.bytes(), {}, slots=1, cache_bytes=0)
    request = Request((70,), tokens=20, stop_strings=tuple("aeiou tnr"))
    assert answer(engine, request).tokens
    assert not copied


def test_a_state_that_is_not_finite_is_not_kept(params):
    broken = jax.tree.map(lambda leaf: leaf + float("nan"), STATES["poet"])
    engine = Engine(MODEL, params, Tokenizer.bytes(), {"broken": broken}, slots=1)
    request = Request((70, 71), state="broken", tokens=20)
    assert answer(engine, request).ended == "failed"
    key = engine._start("broken").key
    assert engine._cache.find(key, (70, 71, 72)).length == 1
