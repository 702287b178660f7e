"""How benchmarks choose learning rates and keep rows of earlier runs."""

import json
import math

from benchmarks.dense_decorrelation import end_of
from benchmarks.paper_table import carried_over
from benchmarks.rate_search import compared
from benchmarks.rates import at_edge
from benchmarks.text_table import best_rate

NAN = float("nan")


def test_a_row_has_the_best_rate_by_mean_over_styles():
    by_rate = {
        0.1: {"poems": 1.0, "letters": 2.4},
        0.3: {"poems": 1.1, "letters": 2.0},
        1.0: {"poems": 1.3, "letters": 2.0},
    }
    assert best_rate(by_rate) == 0.3


def test_a_rate_that_diverges_on_one_style_is_not_chosen():
    by_rate = {
        0.1: {"poems": 1.0, "letters": 2.4},
        0.3: {"poems": 0.5, "letters": NAN},
    }
    assert best_rate(by_rate) == 0.1


def test_a_diverged_run_ranks_last():
    assert end_of({"loss_nats": [3.0, NAN]}) == math.inf
    assert end_of({"loss_nats": [3.0, 2.0]}) == 2.0


def test_a_found_rate_is_compared_with_the_sweep():
    sweep = {"0.1": 2.0, "0.3": 1.0, "1.0": NAN}
    assert compared({"rate": 0.1}, sweep)["excess"] == 1.0
    best = compared({"rate": 0.3}, sweep)
    assert best["excess"] == 0.0 and not best["at_edge"]
    assert compared({"rate": 0.3}, {"0.1": 2.0, "0.3": 1.0})["at_edge"]
    # One that is not in the sweep counts as the worst.
    assert compared({"rate": 0.001}, sweep)["excess"] == math.inf


def test_a_rate_is_at_the_edge_if_no_tried_rate_lies_beyond_it():
    assert [at_edge(rate, (0.3, 0.1, 1.0)) for rate in (0.1, 0.3, 1.0)] == [
        True,
        False,
        True,
    ]
    # By their size, not by their letters.
    assert at_edge("3e-05", {"0.1": 1.0, "3e-05": 1.0, "0.003": 1.0})
    # Of one or two rates, each is at the edge.
    assert at_edge(0.1, [0.1]) and at_edge(0.1, [0.1, 0.3])


def test_rows_of_earlier_runs_keep_their_date(tmp_path):
    path = tmp_path / "r.json"
    assert carried_over(path) == {}
    rows = {"E8 conditioning": {"passed": True}, "E6 steering": {"date": "2026-01-02"}}
    path.write_text(json.dumps({"date": "2026-01-01", "versions": {}, **rows}))
    assert carried_over(path) == {
        "E6 steering": {"date": "2026-01-02"},
        "E8 conditioning": {"passed": True, "date": "2026-01-01"},
    }
