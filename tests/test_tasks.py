"""Synthetic tasks: answers are right, alone counted, and the same for the same seed and step."""

import re

import numpy as np
import pytest

from rwkv7_jax.tasks import TASKS, task_batch

SIZES = {"batch_size": 4, "length": 120}
TRUE = {
    "copy": lambda words: words[0],
    "recall": lambda words: dict(words[:-1])[words[-1]],
    "parity": lambda words: str(words[0].count("1") % 2),
    "addition": lambda words: str(int(words[0]) + int(words[1])),
}


def text(ids) -> str:
    return bytes(i - 1 for i in ids if i).decode()


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_right_and_they_alone_count(name):
    batch = task_batch(name, 3, **SIZES)
    assert batch["tokens"].shape == (4, 121) and batch["mask"].shape == (4, 120)
    for row, mask in zip(batch["tokens"], batch["mask"], strict=True):
        lines = text(row).split("\n")[:-1]
        assert len(lines) > 2
        answers = []
        for line in lines:
            question, answer = line.split(" = ")
            assert TRUE[name](question.split(" ")[1:]) == answer
            answers.append(answer + "\n")
        counted = text(row[1:] * mask.astype(int))
        assert re.fullmatch(re.escape("".join(answers)) + r"\w*", counted)


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_a_function_of_seed_step_and_part(name):
    batches = {
        (seed, step, held): task_batch(name, step, seed=seed, held_out=held, **SIZES)["tokens"]
        for seed in (0, 1)
        for step in (0, 1)
        for held in (False, True)
    }
    assert len({batch.tobytes() for batch in batches.values()}) == 8
    again = task_batch(name, 1, seed=1, held_out=True, **SIZES)["tokens"]
    np.testing.assert_array_equal(again, batches[1, 1, True])


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="must be one of copy, recall, parity, addition; got 'x'"):
        task_batch("x", 0, **SIZES)
