"""On accelerators prompts are read together; what an answer says does not depend on that."""

import dataclasses

import pytest
from engine_cases import (
    BYTES,
    MODEL,
    STATES,
    answer,
    ask,
    compiled_by,
    drawn_requests,
    wide_states,
    work,
)

from rwkv7_jax.serving import slots
from rwkv7_jax.serving.engine import Engine
from rwkv7_jax.serving.requests import Request

# What a CPU does: one prompt per call.
_ON_CPU = slots._ON_CPU


@pytest.fixture(autouse=True)
def _as_on_an_accelerator(monkeypatch):
    # Shorter chunks than those of an accelerator, which have fewer programs.
    monkeypatch.setattr(slots, "_ON_CPU", slots.Prefill(chunk=64, rows=4))


def engine_of(params, states=STATES, **options):
    return Engine(MODEL, params, BYTES, states, **{"slots": 5, **options})


def calls_of(engine, monkeypatch):
    """Lists the number of prompts and the width of each call of the device."""
    calls = []
    read = engine._slots.read

    def note(states, chunks):
        width = engine._slots.width_of(max(map(len, chunks)))
        calls.append((len(chunks), width))
        return read(states, chunks)

    monkeypatch.setattr(engine._slots, "read", note)
    return calls


def answers_of(engine, requests):
    asked = [ask(engine, request) for request in requests]
    work(engine)
    return [only for _, (only,) in asked]


@pytest.mark.parametrize("states", [STATES, wide_states("delta")])
def test_answers_are_those_of_prompts_read_one_by_one(params, monkeypatch, states):
    requests = []
    for index, request in enumerate(drawn_requests(9)):
        name = (None, *states)[index % (len(states) + 1)]
        request = dataclasses.replace(request, prompt=request.prompt[:16])
        requests.append(dataclasses.replace(request, state=name))
    together = engine_of(params, states)
    calls = calls_of(together, monkeypatch)
    one_by_one = engine_of(params, states)
    one_by_one._slots._prefill = _ON_CPU
    found = answers_of(together, requests)
    expected = answers_of(one_by_one, requests)
    assert [only.tokens for only in found] == [only.tokens for only in expected]
    assert max(rows for rows, _ in calls) > 1


def test_scores_do_not_depend_on_other_requests_bit_for_bit(params):
    requests = [
        dataclasses.replace(request, alternatives=3, stop_strings=())
        for request in drawn_requests(7, seed=3)
    ]
    together = engine_of(params, cache_bytes=0)
    alone = engine_of(params, cache_bytes=0)
    for request, found in zip(requests, answers_of(together, requests), strict=True):
        assert found.scores
        assert answer(alone, request).scores == found.scores


def test_prompts_of_one_width_are_one_call(params, monkeypatch):
    engine = engine_of(params)
    calls = calls_of(engine, monkeypatch)
    for length in (5, 9, 12, 30, 40):
        ask(engine, Request((65,) * length, tokens=1, temperature=0.0))
    engine.tick()
    assert sorted(calls) == [(1, 32), (1, 64), (3, 16)]


def test_a_long_prompt_is_read_alone_in_long_chunks(params, monkeypatch):
    engine = engine_of(params)
    calls = calls_of(engine, monkeypatch)
    answer(engine, Request((65,) * 150, tokens=1, temperature=0.0))
    assert calls == [(1, 64), (1, 64), (1, 32)]


@pytest.mark.parametrize(
    ("width", "rows"), [(16, 5), (128, 5), (256, 4), (512, 2), (1024, 1)]
)
def test_a_call_reads_no_more_tokens_than_one_chunk(params, monkeypatch, width, rows):
    monkeypatch.setattr(slots, "_ON_CPU", slots._ON_ACCELERATOR)
    assert engine_of(params)._slots.rows_of(width) == rows


def test_nothing_is_compiled_after_the_warm_up(params):
    engine = engine_of(params)
    engine.warm_up()
    assert compiled_by(engine, drawn_requests(9, seed=5)) == []
