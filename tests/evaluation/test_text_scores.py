"""Tables of scores: their lines and their JSON."""

import dataclasses
import json
import math

import numpy as np
import pytest

from rwkv7_jax.evaluation.ratio import Ratio
from rwkv7_jax.evaluation.scoring import Answers, Score
from rwkv7_jax.evaluation.text_scores import answer_table, rows_as_json, text_table

POSITIONS = ((0, 32, 2.5), (32, 64, math.nan))


# Bytes of three windows.
SIZES = np.array([10.0, 20.0, 70.0])


def scored(bits: float, noise=(0.0, 0.0, 0.0)) -> Score:
    """Make a score with these bits per byte and noise that sums to zero."""
    by_window = Ratio(bits * SIZES + np.array(noise), SIZES)
    return Score(
        bits_per_byte=bits,
        perplexity=2.0**bits,
        by_position=POSITIONS,
        tokens=1234,
        standard_error=by_window.standard_error,
        by_window=by_window,
    )


BASE = scored(2.0, (-5.0, 5.0, 0.0))
TUNED = scored(1.5, (-4.0, 5.0, -1.0))


def test_a_row_has_its_error_and_difference_from_the_first():
    lines = text_table("new text", {"base": BASE, "tuned state": TUNED})
    head, base, tuned, foot = lines.splitlines()
    assert head.split()[-2:] == ["0-31", "32-63"]
    assert base.split() == "base 2.0000 +-0.0866 +0.0% 4.000 2.500 nan".split()
    assert tuned.split()[2:6] == ["1.5000", "+-0.0794", "-0.5000", "+-0.0173"]
    assert tuned.split()[6] == "-25.0%"
    assert foot.startswith("1,234 tokens, 3 windows; +- is the standard error")
    assert len(base) == len(tuned) <= 100


def test_a_single_window_has_no_standard_error():
    one = Ratio(np.array([20.0]), np.array([10.0]))
    row = Score(2.0, 4.0, (), 9, one.standard_error, one)
    lines = text_table("new text", {"base": row, "tuned state": row}).splitlines()
    assert "+-" not in "".join(lines)
    assert lines[-1] == "9 tokens, 1 window: too few for a standard error"
    assert rows_as_json({"base": row})["base"]["standard_error"] is None


def test_json_has_the_paired_difference_from_the_first_row():
    found = rows_as_json({"base": BASE, "tuned state": TUNED})
    assert "difference" not in found["base"]
    assert found["tuned state"]["difference"] == pytest.approx(-0.5)
    assert found["tuned state"]["difference_error"] == pytest.approx(0.01732, rel=1e-3)
    assert found["base"]["by_window"]["weights"] == SIZES.tolist()


def test_rows_with_other_windows_have_no_difference():
    other = Ratio(np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="must have the same parts"):
        BASE.difference(dataclasses.replace(TUNED, by_window=other))


def test_a_base_loss_of_0_has_no_relative_change():
    table = text_table("new text", {"base": scored(0.0), "tuned state": scored(1.0)})
    assert "nan%" in table.splitlines()[2]


def answered(right: list[float]) -> Answers:
    """Make scores of answers to rows of four questions."""
    return Answers(
        accuracy=sum(right) / (4 * len(right)),
        nats=1.25,
        exact=0.125,
        by_position=np.array([np.nan, 1.0], np.float32),
        by_row=Ratio(np.array(right, float), np.full(len(right), 4.0)),
    )


def test_the_answer_table_has_a_line_per_start_state():
    rows = {"base": answered([1, 2, 3]), "tuned state": answered([2, 3, 4])}
    _, base, tuned, foot = answer_table("steer", rows).splitlines()
    assert base.split() == ["base", "0.5000", "+-0.1443", "0.1250", "1.250"]
    assert tuned.split()[2:6] == ["0.7500", "+-0.1443", "+0.2500", "+-0.0000"]
    assert len(base) == len(tuned) <= 100
    assert foot.startswith("3 rows; ")
    found = rows_as_json(rows)["tuned state"]
    assert found["standard_error"] == pytest.approx(0.1443, rel=1e-3)
    assert found["difference"] == pytest.approx(0.25)


def test_unmeasured_values_are_null_in_json():
    answers = dataclasses.replace(answered([1, 2]), nats=math.nan)
    base = dataclasses.replace(BASE, perplexity=math.inf, standard_error=-math.inf)
    rows = rows_as_json({"base": base}) | rows_as_json({"task": answers})
    found = json.loads(json.dumps(rows, allow_nan=False))
    assert found["base"]["by_position"] == [[0, 32, 2.5], [32, 64, None]]
    assert found["base"]["perplexity"] is found["base"]["standard_error"] is None
    assert found["task"]["nats"] is None
    assert found["task"]["by_position"] == [None, 1.0]
