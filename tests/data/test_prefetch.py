"""Prefetched batches: order, errors and number."""

import itertools
import threading

import pytest

from rwkv7_jax.data.prefetch import Prefetch


def test_prefetching_keeps_order_and_raises_errors():
    def numbers():
        yield from range(50)
        raise ValueError("at 50")

    ahead = Prefetch(numbers())
    assert [next(ahead) for _ in range(50)] == list(range(50))
    for _ in range(2):
        with pytest.raises(ValueError, match="at 50"):
            next(ahead)
    ahead.close()


def test_prefetching_is_bounded_and_stops_on_close():
    made = []
    others = set(threading.enumerate())
    ahead = Prefetch((made.append(n) or n for n in itertools.count()), ahead=3)
    assert next(ahead) == 0
    assert next(ahead) == 1
    assert len(made) <= 5
    ahead.close()
    started = set(threading.enumerate()) - others
    assert not [thread for thread in started if thread.name.startswith("prefetch")]


def test_a_prefetched_iterator_ends_where_the_other_one_does():
    ahead = Prefetch(iter(range(5)), ahead=3)
    assert list(ahead) == list(range(5))
    assert list(ahead) == []
    ahead.close()


def test_prefetching_needs_at_least_one_item_ahead():
    with pytest.raises(ValueError, match="Prefetch: `ahead` must be at least 1; got 0"):
        Prefetch(iter([1]), ahead=0)


def test_only_an_iterator_is_read_and_not_after_it_is_closed():
    with pytest.raises(TypeError, match="Prefetch: `items` must be"):
        Prefetch([1, 2])
    ahead = Prefetch(iter(range(5)))
    assert next(ahead) == 0
    ahead.close()
    for _ in range(3):
        with pytest.raises(ValueError, match="must not be read after `close`"):
            next(ahead)
