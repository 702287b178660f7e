"""Prefetched batches: order, errors and number."""

import itertools
import time

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
    ahead = Prefetch((made.append(n) or n for n in itertools.count()), ahead=3)
    assert next(ahead) == 0
    time.sleep(0.1)
    assert len(made) <= 5
    ahead.close()
    assert not ahead._thread.is_alive()
