"""Rows of a batch as text."""

import numpy as np

from rwkv7_jax.data.row_preview import preview_row
from rwkv7_jax.text.tokenizer import Tokenizer


def test_brackets_enclose_every_masked_span():
    tokens = np.array([0, 98, 99, 100, 0, 101, 0, 0])
    mask = np.array([0, 1, 1, 0, 0, 0, 0])
    assert preview_row(tokens, mask, Tokenizer.bytes()) == ("[[<0>a]]bc[[<0>d]]", 2)


def test_a_full_row_has_no_padding():
    tokens = np.array([0, 98, 99, 100])
    mask = np.array([0, 1, 1])
    assert preview_row(tokens, mask, Tokenizer.bytes()) == ("[[<0>a]]bc", 0)


def test_a_row_of_padding_has_no_text():
    padding = preview_row(np.zeros(4, int), np.zeros(3), Tokenizer.bytes())
    assert padding == ("", 4)
