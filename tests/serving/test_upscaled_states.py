"""Upscaled states and their mixtures answer as if alone: in any row, and from the cache."""

import dataclasses

import jax
import numpy as np
import pytest
from engine_cases import (
    BYTES,
    CONFIG,
    MODEL,
    alone,
    answer,
    ask,
    assert_same,
    requests_of,
    wide_states,
    work,
)
from tiny_models import lively
from tolerances import SAME, assert_close
from upscaled_states import ADDITIVE, empty_state, filled

from rwkv7_jax.serving.engine import Engine

PROMPT = tuple(np.random.default_rng(0).integers(1, 256, 300).tolist())


@pytest.fixture(scope="module")
def params():
    """Weights with which each start state gives a different answer."""
    return lively(CONFIG)


@pytest.mark.parametrize("dynamics", ADDITIVE)
@pytest.mark.parametrize("slots", [1, 3])
def test_states_that_share_a_batch_answer_as_alone(params, dynamics, slots):
    states = wide_states(dynamics)
    engine = Engine(MODEL, params, BYTES, states, slots=slots)
    # Twice, since a row is taken again by a request from another state.
    requests = requests_of(states)
    requests += reversed(requests)
    asked = [ask(engine, request) for request in requests]
    work(engine)
    assert len({only.tokens for _, (only,) in asked}) == len(states) + 1
    for request, (_, (only,)) in zip(requests, asked, strict=True):
        assert_same(only, alone(params, request, states))


@pytest.mark.parametrize("dynamics", ADDITIVE)
def test_cached_prefixes_of_any_length_change_no_answer(params, dynamics):
    states = wide_states(dynamics)
    nothing_kept = Engine(MODEL, params, BYTES, states, slots=2, cache_bytes=0)
    kept = Engine(MODEL, params, BYTES, states, slots=2)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(states["one"]))
    # Two states and ids: most of what is kept is dropped soon.
    two_kept = Engine(MODEL, params, BYTES, states, slots=2, cache_bytes=3 * size)
    draws = np.random.default_rng(1)
    cached = 0
    for index, request in enumerate(5 * requests_of(states)):
        end = int(draws.integers(1, len(PROMPT)))
        prompt = (*PROMPT[:end], *range(60, 60 + index % 3))
        request = dataclasses.replace(
            request, prompt=prompt, seed=index, temperature=0.7 * (index % 2)
        )
        request = dataclasses.replace(request, alternatives=0)
        expected = answer(nothing_kept, request)
        logps = [score.logp for score in expected.scores]
        for engine in (kept, two_kept):
            found = answer(engine, request)
            cached += found.cached_tokens
            assert found.tokens == expected.tokens
            scores = [score.logp for score in found.scores]
            assert_close(scores, logps, SAME["model"])
    assert cached > len(PROMPT)


def test_a_memory_that_replaces_the_wkv_state_is_rejected_next_to_plain_states(params):
    paper = filled(empty_state(CONFIG, "replace"))
    with pytest.raises(ValueError, match=r"Engine: `states` must all have a memory"):
        Engine(MODEL, params, BYTES, {"paper": paper})
    engine = Engine(MODEL, params, BYTES, wide_states("static"))
    with pytest.raises(
        ValueError, match=r"put_state: `state` must have a memory of the same kind"
    ):
        engine.put_state("paper", paper)
