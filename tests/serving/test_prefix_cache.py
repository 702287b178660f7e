"""Shared prefixes are not prefilled again, and answers stay the same."""

import dataclasses

import jax
import numpy as np
import pytest
from engine_cases import CONFIG, alone, answer, assert_same

from rwkv7_jax.model.state import init_state
from rwkv7_jax.serving import prefix_cache
from rwkv7_jax.serving.prefix_cache import PrefixCache
from rwkv7_jax.serving.requests import Request


def test_a_conversation_is_not_prefilled_again_and_states_share_nothing(params, engine):
    first = Request(tuple(range(40, 90)), state="poet", tokens=9, temperature=0.0)
    said = answer(engine, first)
    assert said.cached_tokens == 0
    more = first.prompt + said.tokens + (33, 34, 35)
    second = dataclasses.replace(first, prompt=more)
    again = answer(engine, second)
    # All that the first answer had read, its own tokens included.
    assert again.cached_tokens == len(more) - 3
    assert_same(again, alone(params, second))
    other = answer(engine, dataclasses.replace(second, state="judge"))
    assert other.cached_tokens == 0
    assert other.tokens == tuple(
        alone(params, dataclasses.replace(second, state="judge")).tokens[0]
    )
    # The same prompt once more: all but its last token.
    assert answer(engine, second).cached_tokens == len(more) - 1


@pytest.mark.parametrize("tokens", [5, 8, 13])
def test_an_answer_of_any_length_is_not_prefilled_again(engine, tokens):
    first = Request((70, 71), tokens=tokens, temperature=0.0)
    said = answer(engine, first)
    assert (said.ended, len(said.tokens)) == ("length", tokens)
    more = dataclasses.replace(first, prompt=(*first.prompt, *said.tokens, 33))
    assert answer(engine, more).cached_tokens == len(more.prompt) - 1
    # The state after all of a prompt is cached now, but its last token gives the logits.
    same = dataclasses.replace(first, prompt=more.prompt[:-1])
    assert answer(engine, same).cached_tokens < len(same.prompt)


def test_a_common_prefix_is_prefilled_at_most_twice(params, engine):
    # The fewest shared tokens for which a state is kept.
    system = tuple(range(1, 33))
    asked = [
        Request((*system, 200 + number, 130, 131), tokens=5, temperature=0.0)
        for number in range(4)
    ]
    answers = [answer(engine, request) for request in asked]
    assert [one.cached_tokens for one in answers] == [0, 0, len(system), len(system)]
    for request, one in zip(asked, answers, strict=True):
        assert_same(one, alone(params, request))


def test_the_cache_evicts_the_least_recently_used_entry():
    state = init_state(CONFIG)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # Two states with a few ids each.
    cache = PrefixCache(2 * size + 30)
    # The same ids once more take no more memory.
    for tokens in ((1,), (1, 2), (1, 2)):
        cache.keep(0, tokens, state)
    assert cache.find(0, (1, 9)).length == 1
    cache.keep(7, (1, 2, 3), state)
    assert cache.find(0, (1, 2, 3)).length == 1
    assert cache.find(7, (1, 2, 3, 4)).length == 3
    found = cache.find(7, (1, 2))
    assert (found.length, found.state, found.shared) == (0, None, 2)
    # The ids take memory, too.
    cache.keep(7, tuple(range(9)), state)
    assert cache.find(7, (1, 2, 3, 4)).length == 0
    cache.clear()
    assert cache.find(7, tuple(range(9))).shared == 0
    full = PrefixCache(size + 4)
    full.keep(0, (1,), state)
    assert full.find(0, (1, 2)).length == 1
    nothing = PrefixCache(0)
    nothing.keep(0, (1,), state)
    assert nothing.find(0, (1, 2)).state is None


def leading(one, other):
    """Counts the leading tokens that are the same."""
    pairs = zip(one, other, strict=False)
    differing = (at for at, (a, b) in enumerate(pairs) if a != b)
    return next(differing, min(len(one), len(other)))


def test_a_lookup_equals_a_search_through_all_entries():
    state = init_state(CONFIG)
    draws = np.random.default_rng(0)
    cache = PrefixCache(2**30)
    kept = []
    # Few ids, of which one has a low last byte: orders of numbers and of bytes differ.
    ids = (1, 2, 256, 65535)

    def draw():
        length = draws.integers(0, 9)
        return draws.integers(2), tuple(draws.choice(ids, length).tolist())

    for _ in range(300):
        start, tokens = draw()
        cache.keep(start, tokens, state)
        kept.append((start, tokens))
        start, prompt = draw()
        alike = [tokens for key, tokens in kept if key == start]
        shared = [leading(tokens, prompt) for tokens in alike]
        whole = [len(one) for one in alike if one == prompt[: len(one)]]
        found = cache.find(start, prompt)
        assert found.length == max(whole, default=0)
        assert found.shared == max(shared, default=0)
        assert (found.state is None) == (found.length == 0)


def test_a_full_cache_is_not_searched_linearly(monkeypatch):
    state = init_state(CONFIG)
    cache = PrefixCache(2**30)
    for number in range(500):
        cache.keep(0, (number, number), state)
    compared = []
    common = prefix_cache._Entry.common

    def count(entry, tokens):
        compared.append(entry)
        return common(entry, tokens)

    monkeypatch.setattr(prefix_cache._Entry, "common", count)
    assert cache.find(0, (250, 250, 1)).length == 2
    assert len(compared) < 6
