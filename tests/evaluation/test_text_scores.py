"""Tables of scores: what stands in a line, and JSON that others can read."""

import json
import math

import numpy as np

from rwkv7_jax.evaluation.scoring import Answers, Score
from rwkv7_jax.evaluation.text_scores import answer_table, rows_as_json, text_table

POSITIONS = ((0, 32, 2.5), (32, 64, math.nan))


def scored(bits: float) -> Score:
    return Score(
        bits_per_byte=bits,
        perplexity=2.0**bits,
        by_position=POSITIONS,
        tokens=1234,
        standard_error=0.25,
    )


def test_a_row_is_compared_with_the_first():
    lines = text_table("new text", {"base": scored(2.0), "tuned state": scored(1.5)})
    head, base, tuned, foot = lines.splitlines()
    assert head.split()[-2:] == ["0-31", "32-63"]
    assert base.split() == ["base", "2.0000", "+0.0%", "4.000", "2.500", "nan"]
    assert tuned.split()[2:4] == ["1.5000", "-25.0%"]
    assert foot.split() == ["1,234", "tokens,", "+-0.250"]


def test_a_base_that_is_certain_leaves_no_change_to_name():
    table = text_table("new text", {"base": scored(0.0), "tuned state": scored(1.0)})
    assert "nan%" in table.splitlines()[2]


def test_answers_have_a_line_for_each_start():
    row = Answers(accuracy=0.5, nats=1.25, exact=0.125, by_position=np.ones(3))
    lines = answer_table("steer", {"base": row}).splitlines()
    assert lines[1].split() == ["base", "0.5000", "0.1250", "1.250"]


def test_json_has_null_where_nothing_was_measured():
    answers = Answers(
        accuracy=0.5,
        nats=math.nan,
        exact=0.0,
        by_position=np.array([np.nan, 1.0], np.float32),
    )
    rows = {"base": scored(2.0), "task": answers}
    found = json.loads(json.dumps(rows_as_json(rows), allow_nan=False))
    assert found["base"]["by_position"] == [[0, 32, 2.5], [32, 64, None]]
    assert found["task"]["nats"] is None
    assert found["task"]["by_position"] == [None, 1.0]
