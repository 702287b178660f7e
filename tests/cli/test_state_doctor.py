"""The rows and the tables of `rwkv7 state doctor`."""

import argparse
import dataclasses

import numpy as np

from rwkv7_jax.cli import state_doctor
from rwkv7_jax.evaluation.advice import Diagnosis, RetentionScore
from rwkv7_jax.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()


def test_rows_of_questions_begin_with_a_question(tmp_path):
    """A state stands at the beginning of a question, so its effect is measured there."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "ask 7", "answer": "12"}\n' * 30)
    for held_out in (0.0, 1.0):
        options = argparse.Namespace(
            data=str(path), length=16, windows=5, held_out=held_out
        )
        batch = state_doctor._batch(options, "data", BYTES)
        assert len(batch.tokens) == 5
        assert {BYTES.decode(row) for row in batch.tokens} == {"ask 712"}


def test_a_loss_that_is_nan_is_not_shown_as_0():
    score = RetentionScore("own", 1.0, 1.0, 0.0, 0.0, 0.0, 3)
    diagnosis = Diagnosis(
        memories={},
        base_nats=np.array([1.0, np.nan, 2.0]),
        tuned_nats=np.array([np.nan, np.nan, 3.0]),
        counts=np.array([1.0, 0.0, 2.0]),
        own=score,
        generic=None,
    )
    *_, first, second, third = state_doctor._positions(diagnosis).splitlines()
    assert first.split() == ["0", "1.0000", "nan"]
    assert second.split() == ["1", "-", "-"]
    assert third.split() == ["2", "2.0000", "3.0000"]
    finite = dataclasses.replace(diagnosis, tuned_nats=diagnosis.base_nats)
    assert "nan" not in state_doctor._positions(finite)
