"""A device that does not answer is noticed, and does not hold up the end of the process."""

import threading

import pytest
from engine_cases import BYTES, MODEL, ask, work

from rwkv7_jax.serving.engine import Engine
from rwkv7_jax.serving.requests import Request
from rwkv7_jax.serving.watchdog import Watchdog


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


def test_a_round_is_over_after_its_seconds_and_pauses_count_for_nothing(clock):
    watchdog = Watchdog(5, clock=clock)
    clock.seconds += 100
    assert not watchdog.is_over
    for _ in range(3):
        with watchdog.watch():
            clock.seconds += 5
            assert not watchdog.is_over
    with pytest.raises(IndexError), watchdog.watch():
        clock.seconds += 5.5
        assert watchdog.is_over
        raise IndexError
    assert not watchdog.is_over


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "5"])
def test_a_time_that_never_comes_is_refused(seconds):
    with pytest.raises((TypeError, ValueError), match=r"^Watchdog: `seconds` must be"):
        Watchdog(seconds)


@pytest.mark.parametrize("call", ["read", "take", "decode"])
def test_a_device_that_does_not_answer_is_noticed_and_left_behind(
    params, clock, monkeypatch, call
):
    engine = Engine(
        MODEL, params, BYTES, {}, slots=1, watchdog=Watchdog(60, clock=clock)
    )
    usual = getattr(engine._slots, call)
    hangs = threading.Event()
    answers_again = threading.Event()

    def hang(*args, **options):
        hangs.set()
        assert answers_again.wait(60)
        return usual(*args, **options)

    monkeypatch.setattr(engine._slots, call, hang)
    pieces, answers = ask(engine, Request((65, 66), tokens=4, temperature=0.0))
    clock.seconds += 1000
    assert not engine.is_stalled
    engine.start()
    assert hangs.wait(60)
    assert not engine.is_stalled
    clock.seconds += 61
    assert engine.is_stalled
    thread = engine._thread
    engine.close()
    assert thread.is_alive()
    assert [only.ended for only in answers] == ["cancelled"]
    # One that answers after all changes nothing any more.
    answers_again.set()
    thread.join(60)
    assert not thread.is_alive()
    assert len(answers) == 1 and not pieces and engine.failure is None


def test_an_engine_that_works_is_not_stalled(params, clock):
    engine = Engine(
        MODEL, params, BYTES, {}, slots=1, watchdog=Watchdog(60, clock=clock)
    )
    ask(engine, Request((65,), tokens=9, temperature=0.0))
    work(engine)
    clock.seconds += 1000
    assert not engine.is_stalled
