"""After an answer, however it ended, the next turn of the conversation reads what is new alone."""

import dataclasses
import itertools

import engine_cases
import jax
import pytest
from engine_cases import MODEL, STATES, alone, answer, assert_same
from tolerances import SAME, assert_trees_close

from rwkv7_jax.generation.prefill import prefill_rows
from rwkv7_jax.serving.engine import Engine
from rwkv7_jax.serving.requests import Request
from rwkv7_jax.serving.slots import BLOCK
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
    start = engine._states.get(request.state)
    kept = engine._cache.find(start.key, ids)
    assert kept.length == len(ids)
    fresh = prefill_rows(MODEL, params, start.state, [ids], chunk=256)
    assert_trees_close(kept.state, fresh, SAME["model"])
    following = dataclasses.replace(request, prompt=(*ids, *NEW), tokens=4)
    again = answer(engine, following)
    # The last token is read by the row.
    assert again.prompt_tokens - again.cached_tokens <= len(NEW)
    assert_same(again, alone(params, following))


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 33, 70])
def test_an_answer_that_a_stop_string_ended_is_not_read_again(
    params, letters, monkeypatch, length
):
    """However many blocks the stop string lies in, and where in a block or a token it begins."""
    monkeypatch.setattr(engine_cases, "BYTES", letters)
    engine = Engine(MODEL, params, letters, STATES, slots=2)
    for begin in range(8, 40):
        free = Request((70, 71), state="poet", tokens=64, seed=begin, temperature=1.0)
        text = alone(params, free).texts[0]
        stop = text[begin : begin + length]
        if not stop:
            # The vocabulary's end of text came before.
            continue
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


@pytest.fixture(scope="module")
def blanks():
    """A vocabulary in which every second id is blanks."""
    words = map("".join, itertools.product(LETTERS, LETTERS))
    entries = {}
    for id in range(1, 257):
        word = next(words) if id % 2 else " " * (id // 2)
        entries[id] = word.encode()
    return Tokenizer(entries, vocab_size=257, name="blanks")


@pytest.mark.parametrize("stops", [(), ("a", "b", "c d", "e  ")])
def test_a_message_comes_back_without_the_blanks_at_its_end(params, blanks, stops):
    """However it ended, and wherever in a block its blanks begin."""
    engine = Engine(MODEL, params, blanks, STATES, slots=1)
    trimmed = 0
    for seed in range(30):
        request = Request((70, seed + 1), tokens=seed % 13 + 8, seed=seed)
        request = dataclasses.replace(request, stop_strings=stops, is_message=True)
        said = answer(engine, request)
        back = list(said.tokens)
        while back and back[-1] % 2 == 0:
            back.pop()
        if len(back) < len(said.tokens) // BLOCK * BLOCK:
            # No state is from before the blanks.
            continue
        trimmed += len(back) < len(said.tokens)
        ids = (*request.prompt, *back)
        key = engine._states.get(None).key
        kept = engine._cache.find(key, (*ids, 255, 255))
        assert kept.length == len(ids)
        fresh = prefill_rows(
            MODEL, params, engine._states.get(None).state, [ids], chunk=256
        )
        assert_trees_close(kept.state, fresh, SAME["model"])
    assert trimmed > 5


def test_blanks_that_fill_more_than_a_block_keep_no_state_of_theirs(params, blanks):
    stops = tuple(range(1, 257, 2))
    request = Request((70, 71), tokens=40, stop_ids=stops, is_message=True)
    for seed in range(200):
        said = alone(params, dataclasses.replace(request, seed=seed))
        if len(said.tokens[0]) > BLOCK:
            break
    engine = Engine(MODEL, params, blanks, {}, slots=1)
    only = answer(engine, dataclasses.replace(request, seed=seed))
    assert only.text.isspace() and only.tokens == tuple(said.tokens[0])
    # What was read of the prompt.
    assert engine._cache.find(engine._states.get(None).key, (70, 71, 72)).length == 1


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
    key = engine._states.get("broken").key
    assert engine._cache.find(key, (70, 71, 72)).length == 1
