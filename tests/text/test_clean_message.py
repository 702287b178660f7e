"""Blank lines in messages, which would end a turn."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv7_jax.text.chat_template import clean_message


@settings(max_examples=400)
@given(st.text(st.sampled_from("ab \n\n\n\r\t\x85\u00a0\u2028"), max_size=30))
def test_cleaning_matches_the_regular_expression(text):
    plain = text.replace("\r\n", "\n")
    assert clean_message(text) == re.sub(r"\s*\n\s*\n", "\n", plain).strip()


@pytest.mark.parametrize("blanks", [" ", "\n", "\n ", " \t\u3000"])
def test_cleaning_takes_linear_time(blanks):
    """Quadratic time would grow 16-fold for 4 times the blanks; the bound is generous."""

    def seconds(count):
        text = "a" + blanks * count + "\n" + blanks * count + "b"
        best = []
        for _ in range(5):
            begin = time.perf_counter()
            clean_message(text)
            best.append(time.perf_counter() - begin)
        return min(best)

    assert seconds(4_000) < 10 * seconds(1_000) + 0.01
