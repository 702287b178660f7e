"""Paired differences, their standard errors, and tables of tasks."""

import json
import math

import numpy as np
import pytest

from rwkv7_jax.evaluation.task_scores import (
    QuestionScores,
    pooled,
    score_table,
    scores_as_json,
)


def scores(totals, weights=None, questions=None):
    """Make scores of numbered questions."""
    weights = np.ones(len(totals)) if weights is None else np.array(weights, float)
    names = questions or tuple(str(number) for number in range(len(totals)))
    return QuestionScores(np.array(totals, float), weights, names)


def test_mean_and_standard_error_match_the_usual_formulas():
    one = scores([1, 0, 1, 1])
    assert one.value == 0.75
    error = np.std([1, 0, 1, 1], ddof=1) / 2
    assert one.standard_error == pytest.approx(error, rel=1e-12)


def test_bits_per_byte_is_a_ratio_of_sums():
    one = scores([10, 1], weights=[100, 1])
    assert one.value == pytest.approx(11 / 101)


def test_shared_difficulty_cancels_in_the_paired_error():
    base = scores([0, 0, 1, 1])
    difference, error = scores([0.1, 0.1, 1.1, 1.1]).difference(base)
    assert difference == pytest.approx(0.1)
    assert error == pytest.approx(0, abs=1e-12)
    assert base.standard_error > 0.2


def test_the_paired_error_matches_repeated_experiments():
    rng = np.random.default_rng(0)
    differences = []
    errors = []
    for _ in range(2000):
        weights = rng.uniform(1, 5, 50)
        hard = rng.normal(0, 3, 50) * weights
        base = scores(hard + rng.normal(0, 1, 50), weights)
        other = scores(hard + rng.normal(0, 1, 50), weights)
        difference, error = other.difference(base)
        differences.append(difference)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.05)


def test_scores_of_different_questions_cannot_be_compared():
    with pytest.raises(ValueError, match="must have the same questions"):
        scores([1, 0]).difference(scores([1, 0], questions=("0", "2")))


def test_pooling_weights_all_questions_equally():
    both = pooled([scores([1, 1, 0, 0]), scores([1])])
    assert both.value == pytest.approx(3 / 5)


def test_a_single_question_has_a_null_error_in_json():
    rows = {
        "base": {"task": {"acc": scores([1])}},
        "state": {"task": {"acc": scores([0])}},
    }
    cells = json.loads(json.dumps(scores_as_json(rows), allow_nan=False))["task"]
    assert cells["base"]["acc"] == {"value": 1, "standard_error": None, "questions": 1}
    assert cells["state"]["acc"]["difference"] == -1
    assert cells["state"]["acc"]["difference_error"] is None
    assert math.isnan(scores([1]).standard_error)


def test_a_table_shows_differences_from_the_first_row():
    rows = {
        "base": {"sums": {"acc": scores([1, 0, 0, 0])}},
        "tuned state": {"sums": {"acc": scores([1, 1, 0, 0])}},
    }
    head, base, tuned = score_table("sums", rows).splitlines()
    assert head.startswith("sums (4)")
    assert head.split()[-2:] == ["acc", "difference"]
    assert base.split() == ["base", "0.2500", "+-0.2500"]
    assert tuned.split()[2:] == ["0.5000", "+-0.2887", "+0.2500", "+-0.2500"]
    assert tuned.index("0.5000") == base.index("0.2500")


@pytest.mark.parametrize("longer", ["base", "state"])
def test_only_metrics_that_all_rows_have_are_shown(longer):
    rows = {name: {"sums": {"acc": scores([1, 0])}} for name in ("base", "state")}
    rows[longer]["sums"] = {"median": scores([1, 1]), **rows[longer]["sums"]}
    head, *lines = score_table("sums", rows).splitlines()
    assert head.split() == ["sums", "(2)", "acc", "difference"]
    assert [line.split()[1] for line in lines] == ["0.5000", "0.5000"]
    cells = scores_as_json(rows)["sums"]
    assert cells["base"].keys() == cells["state"].keys() == {"acc"}
