"""Tuning: the fastest tile that is right, each in a process of its own."""

import json

import numpy as np
import pytest

from pallas_kernels import tiles, tune
from pallas_kernels.cases import Case

CASE = Case(1, 40, 1, 32, 32)
TILE = tiles.Tile(4, 1, 32)
GPU = tiles.GPU(16, TILE, TILE, TILE)


def candidate(name="pallas_gpu", choice=GPU, **changes):
    """Returns a candidate in Pallas's interpreter."""
    made = tune.Candidate(
        name=name,
        case=CASE,
        dtype="float32",
        choice=choice,
        backward=False,
        repeats=1,
        interpret=True,
    )
    return made._replace(**changes)


def test_tuning_keeps_the_fastest_tile_of_every_kernel():
    best = tiles.GPU(
        32, tiles.Tile(2, 3, 16), tiles.Tile(8, 2, 32), tiles.Tile(8, 1, 64)
    )

    def measure(choice, backward):
        return 1.0 + sum(x != y for x, y in zip(choice, best, strict=True))

    assert tune.tune_gpu(measure, 64) == best
    tpu = tiles.TPU(32, 4)
    assert tune.tune_tpu(lambda choice, backward: float(choice != tpu)) == tpu


def test_tuning_on_a_cpu_reports_that_there_is_no_kernel():
    with pytest.raises(SystemExit, match="tune: no kernel to tune on cpu"):
        tune.main([])


@pytest.mark.parametrize(
    "made", [candidate(), candidate("pallas_tpu", tiles.TPU(16, 1), backward=True)]
)
def test_a_candidate_round_trips_through_text(made):
    assert tune.Candidate.from_json(made.to_json()) == made


def corrupt(monkeypatch, results):
    """Makes every run of a candidate return the next of `results`."""
    runs = iter(results)
    right = np.ones(3)
    passes = (lambda: next(runs), lambda: right)
    monkeypatch.setattr(tune, "make_passes", lambda candidate: passes)


@pytest.mark.parametrize("wrong", [1.5, np.nan])
def test_a_tile_with_wrong_results_is_never_chosen(monkeypatch, wrong):
    corrupt(monkeypatch, [np.array([1.0, wrong, 1.0])])
    wall, reason = tune.check_and_measure(candidate())
    assert wall == np.inf
    assert reason.startswith("wrong")


def test_a_tile_whose_runs_differ_in_a_bit_is_never_chosen(monkeypatch):
    once = np.ones(3)
    corrupt(monkeypatch, [once] * 20 + [np.nextafter(once, 2)])
    assert tune.check_and_measure(candidate()) == (np.inf, "not repeatable")


def test_a_crashed_or_silent_child_loses_only_its_own_tile(monkeypatch, capsys):
    monkeypatch.setattr(tune.sys, "executable", "false")
    assert tune.measure_apart(candidate()) == np.inf
    assert "no result" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "made", [candidate(), candidate("pallas_tpu", tiles.TPU(16, 1))]
)
def test_a_correct_tile_is_measured_in_the_interpreter(made, backward):
    wall, reason = tune.check_and_measure(made._replace(backward=backward))
    assert reason == ""
    assert np.isfinite(wall)


@pytest.mark.slow
def test_a_candidate_is_measured_in_its_own_process(capsys):
    assert np.isfinite(tune.measure_apart(candidate()))
    assert json.loads(candidate().to_json())[0] == "pallas_gpu"
