"""The recall table: learning rates are chosen by validation, and missing cells are reported."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import mqar, recall
from benchmarks.mqar import SMALL
from benchmarks.paper_table import Cells


@pytest.mark.parametrize(
    ("validation", "rate"),
    [
        ({0.003: 0.9, 0.01: 0.95, 0.03: 0.5}, 0.01),
        ({0.003: 0.99, 0.01: 0.95, 0.03: 0.5}, 0.003),
        # Solved at each rate: the middle one, for the edge says nothing then.
        ({0.003: 1.0, 0.01: 0.999, 0.03: 1.0}, 0.01),
        ({0.01: 0.3}, 0.01),
    ],
)
def test_the_best_rate_is_chosen_and_the_middle_of_ties(validation, rate):
    assert recall.choose_rate(validation) == rate


def cell(seed, right):
    """Return a cell as the trainer does."""
    tests = {str(size): right for size in SMALL.tests}
    return {
        "seed": seed,
        "validation": right,
        "tests": tests,
        "cpu_s": 1.0,
        "steps": 9,
    }


def table_of(tmp_path, found):
    """Return a table of cached cells."""
    cells = Cells(tmp_path, recall.DEPENDENCIES)
    for (name, rate, seed), right in found.items():
        cells.get(f"{name} | {rate:g} | {seed}", lambda s=seed, r=right: cell(s, r))
    return recall.Table(cells, SMALL, cached=True)


def test_a_rate_at_the_edge_is_marked(tmp_path):
    found = {("based-4", rate, 0): rate for rate in SMALL.rates}
    row = table_of(tmp_path, found).row("based-4", [0])
    assert row["rate"] == max(SMALL.rates)
    assert row["at_edge"]


def test_fewer_than_three_rates_count_as_the_edge(tmp_path):
    found = {("based-4", 0.01, 0): 0.9, ("based-4", 0.003, 0): 0.5}
    assert table_of(tmp_path, found).row("based-4", [0, 1])["at_edge"]


def test_missing_cells_are_not_filled_in(tmp_path):
    found = {
        ("based-4", 0.003, 0): 0.5,
        ("based-4", 0.01, 0): 0.9,
        ("based-4", 0.01, 2): 0.7,
        ("based-4", 0.03, 0): 0.2,
    }
    table = table_of(tmp_path, found)
    row = table.row("based-4", range(3))
    assert row["seeds"] == [0, 2]
    assert row["tests"][str(SMALL.tests[0])] == [0.9, 0.7]
    assert table.row("based-8", range(3)) is None


@pytest.mark.parametrize("name", ["based-4", "tuned-delta-16-64"])
@pytest.mark.parametrize("best", [0.001, 0.01, 0.1, 1.0])
def test_rates_are_added_until_the_best_is_not_at_the_edge(
    tmp_path, monkeypatch, name, best
):
    made = []

    def make_cell(name, setting, rates, seed):
        made.append((rates[0], seed))
        return [cell(seed, 1 / (1 + abs(np.log10(rates[0] / best))))]

    monkeypatch.setattr(recall, "make_cell", make_cell)
    table = recall.Table(Cells(tmp_path, recall.DEPENDENCIES), SMALL)
    row = table.row(name, range(3))
    tried = [rate for rate, seed in made if seed == 0]
    is_offered = best < 1.0 if name == "based-4" else best > 0.001
    assert row["at_edge"] == (not is_offered)
    if is_offered:
        assert row["rate"] == best
        assert min(tried) < best < max(tried)
    # Each cell once, and further seeds at the chosen rate alone.
    assert len(set(made)) == len(made)
    assert [(row["rate"], 1), (row["rate"], 2)] == made[-2:]


@pytest.mark.parametrize(("right", "missed"), [(0.999, []), (0.5, ["attention"])])
def test_the_gate_reports_results_below_their_bar(tmp_path, right, missed):
    shares = {
        "attention": right,
        "window-16": 0.2,
        "based-4": 0.8,
        "based-8": 0.99,
        "based-16": 1.0,
        "rwkv-16-L1": 0.9,
        "rwkv-32-L1": 0.99,
    }
    found = {(name, 0.01, 0): share for name, share in shares.items()}
    assert recall.quick(table_of(tmp_path, found)) == missed


def test_the_gate_reports_a_violated_order(tmp_path):
    shares = dict.fromkeys(recall.BARS, 0.97)
    shares["window-16"] = 0.1
    found = {(name, 0.01, 0): share for name, share in shares.items()}
    missed = recall.quick(table_of(tmp_path, found))
    assert missed == [
        "attention",
        "based-4 < based-8 < based-16",
        "rwkv-16-L1 < rwkv-32-L1",
    ]


def test_only_a_written_memory_counts_in_the_state_bytes():
    static = recall.sizes_of("tuned-static-16-64", SMALL)
    written = recall.sizes_of("tuned-delta-16-64", SMALL)
    plain = recall.sizes_of("rwkv-16-L1", SMALL)
    assert static["matrix_bytes"] == plain["matrix_bytes"]
    assert written["matrix_bytes"] == plain["matrix_bytes"] + 4 * 32 * 64


@pytest.mark.slow
def test_a_table_of_cached_cells_is_printed_plotted_and_saved(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    found = {}
    for name in ("based-4", "rwkv-16-L1"):
        for rate in SMALL.rates:
            found[name, rate, 0] = 0.9 if rate == 0.01 else 0.2
    table_of(tmp_path / "cells", found)
    monkeypatch.setattr(
        "sys.argv",
        [
            "recall",
            "--cached",
            f"--cells={tmp_path / 'cells'}",
            f"--json={tmp_path / 'recall.json'}",
            f"--pictures={tmp_path}",
            "--no-speed",
        ],
    )
    assert recall.main() == 0
    written = json.loads((tmp_path / "recall.json").read_text())
    assert set(written["table"]) == {"based-4", "rwkv-16-L1"}
    assert "attention" in written["not_run"]
    assert (tmp_path / "recall-bytes.png").stat().st_size > 5000


@pytest.mark.slow
def test_published_sizes_are_trained_in_order_with_all_rates_together(
    tmp_path, monkeypatch
):
    small = dataclasses.replace(
        SMALL, steps=6, rows=4, test_rows=64, rates=(0.001, 0.01)
    )
    monkeypatch.setattr(recall, "FULL", small)
    monkeypatch.setattr(recall, "FULL_NAMES", ("based-4",))
    cells = Cells(tmp_path, recall.DEPENDENCIES)
    recall.full(cells, minutes=5)
    assert list(cells.results) == ["based-4 | D 64", "based-4 | D 128"]
    for cell in cells.results.values():
        assert [one["rate"] for one in cell["found"]] == [0.001, 0.01]


def test_no_training_starts_after_the_time_limit(tmp_path):
    cells = Cells(tmp_path, recall.DEPENDENCIES)
    recall.full(cells, minutes=0)
    assert not cells.results


def test_distinct_numbers_are_sampled_uniformly():
    found = mqar._distinct(np.random.default_rng(0), 500, 32, mqar.MANY)
    assert not mqar._has_equal(found).any()
    assert found.min() >= 0
    assert found.max() < mqar.MANY
    # Each of eight equal ranges holds an eighth of 16,000 numbers, within five standard errors.
    counts = np.bincount(found.ravel() * 8 // mqar.MANY, minlength=8)
    assert np.all(np.abs(counts - 2000) < 5 * np.sqrt(2000))
