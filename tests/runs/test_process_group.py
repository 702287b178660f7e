"""An error in one process of a run is an error of all, wherever the others are."""

import pytest
from processes_as_threads import run_as_processes

from rwkv7_jax.runs.exit_codes import EndedElsewhere


def fail_in_one(where):
    """Makes a call that exchanges once inside and fails in the second process."""

    def load(member):
        def inner():
            if where == "inside" and member.index == 1:
                raise ValueError("torn")
            return member.index

        def outer():
            if where == "before" and member.index == 1:
                raise ValueError("torn")
            made = member.run_in_all(inner)
            if where == "after" and member.index == 1:
                raise ValueError("torn")
            return made

        return member.run_in_all(outer)

    return load


@pytest.mark.parametrize("where", ["before", "inside", "after"])
def test_an_error_before_in_or_after_an_inner_exchange_ends_all_with_it(where):
    (first, second), members = run_as_processes(fail_in_one(where))
    assert type(second) is ValueError and type(first) is EndedElsewhere
    assert str(first) == str(second) == "torn"
    assert first.code == 2
    assert members[0].exchanges == members[1].exchanges


def test_nested_exchanges_without_an_error_give_each_process_its_result():
    results, members = run_as_processes(fail_in_one("nowhere"), count=3)
    assert results == [0, 1, 2]
    assert [member.exchanges for member in members] == [2, 2, 2]
