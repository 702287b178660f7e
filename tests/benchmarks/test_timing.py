"""Timing of programs that run in turns."""

from benchmarks.timing import RepeatedStep, take_turns


def calls_of(rounds, *, warm):
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    found = take_turns(runs, rounds, warm=warm)
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys(
        "ab", rounds
    )
    return "".join(calls)


def test_programs_are_timed_in_turns():
    assert calls_of(2, warm=False) == "abab"


def test_each_timed_call_follows_a_warm_up_call():
    assert calls_of(2, warm=True) == "aabbaabb"


def test_a_repeated_step_continues_from_its_last_state():
    run = RepeatedStep(
        lambda train, batch: (train + batch, {"loss": train}), train=1, batch=10
    )
    run()
    run()
    assert run.metrics == {"loss": 11}
