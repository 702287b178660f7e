"""The seconds of programs that take turns."""

from benchmarks.timing import RepeatedStep, take_turns


def calls_of(rounds, *, warm):
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    found = take_turns(runs, rounds, warm=warm)
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys(
        "ab", rounds
    )
    return "".join(calls)


def test_programs_take_turns():
    assert calls_of(2, warm=False) == "abab"


def test_a_warm_call_comes_before_each_measured_one():
    assert calls_of(2, warm=True) == "aabbaabb"


def test_a_repeated_step_goes_on_from_where_it_was():
    run = RepeatedStep(
        lambda train, batch: (train + batch, {"loss": train}), train=1, batch=10
    )
    run()
    run()
    assert run.metrics == {"loss": 11}
