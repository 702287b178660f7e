"""The held-out questions are those of text tuning, for every seed."""

import json

import numpy as np
import pytest

from rwkv7_jax.data import token_stream
from rwkv7_jax.test_time.questions import QuestionSet
from rwkv7_jax.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()

FORMS = {
    "question": lambda q, a: {"question": q, "answer": a},
    "prompt": lambda q, a: {"prompt": q, "answer": a},
    "messages": lambda q, a: {
        "messages": [
            {"role": "user", "content": q},
            {"role": "assistant", "content": a},
        ]
    },
}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def file_of(path, form, count=40):
    return write(path, [FORMS[form](f"<{n}>", f"#{n}") for n in range(count)])


def prompts_of(questions, count, *, held_out):
    """Return the number in each prompt of a split."""
    prompts = questions.prompts(0, count, held_out=held_out)
    return [BYTES.decode(prompt).split("<")[1].split(">")[0] for prompt in prompts]


def documents_of(path, share, split):
    """Return the number in each document of a split of a file."""
    stream = token_stream(path, BYTES, split=split, held_out=share)
    text = BYTES.decode(np.asarray(stream).tolist())
    return [part.split(">")[0] for part in text.split("<")[1:]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.7])
def test_the_held_out_split_matches_that_of_text_tuning(tmp_path, form, share):
    path = file_of(tmp_path / "q.jsonl", form)
    for seed in range(2):
        questions = QuestionSet(path, BYTES, seed=seed, held_out=share)
        for split, held_out in (("held_out", True), ("train", False)):
            found = set(prompts_of(questions, 80, held_out=held_out))
            assert found == set(documents_of(path, share, split))


def test_the_seed_only_orders_the_training_questions(tmp_path):
    path = file_of(tmp_path / "q.jsonl", "question")
    one, other = (QuestionSet(path, BYTES, seed=seed, held_out=0.3) for seed in (0, 1))
    assert one.prompts(0, 5, held_out=True) == other.prompts(0, 5, held_out=True)
    assert one.prompts(0, 5) != other.prompts(0, 5)


def test_larger_held_out_shares_are_nested(tmp_path):
    path = file_of(tmp_path / "q.jsonl", "prompt", count=6)
    before = set()
    for share in (0.001, 0.3, 0.6, 0.999):
        questions = QuestionSet(path, BYTES, held_out=share)
        measured = set(prompts_of(questions, 12, held_out=True))
        trained = set(prompts_of(questions, 12, held_out=False))
        assert before <= measured and measured and trained
        assert not measured & trained and len(measured | trained) == 6
        before = measured


def test_a_prompt_is_held_out_with_any_of_its_answers(tmp_path):
    records = [FORMS["prompt"](f"<{n % 8}>", f"#{n}") for n in range(40)]
    path = write(tmp_path / "q.jsonl", records)
    questions = QuestionSet(path, BYTES, held_out=0.1, verifier=None)
    measured = set(prompts_of(questions, 80, held_out=True))
    assert measured == set(documents_of(path, 0.1, "held_out"))
    assert not measured & set(prompts_of(questions, 80, held_out=False))


def test_questions_without_a_text_answer_are_split_by_prompt(
    tmp_path,
):
    parts = []
    for answer in ({}, {"answer": 7}, {"answer": 8}):
        records = [{"prompt": f"<{n}>", **answer} for n in range(40)]
        path = write(tmp_path / "q.jsonl", records)
        questions = QuestionSet(path, BYTES, held_out=0.3)
        parts.append(set(prompts_of(questions, 80, held_out=True)))
    assert parts[0] == parts[1] == parts[2]
    assert 0 < len(parts[0]) < 40


@pytest.mark.parametrize("own_file", [False, True])
def test_a_held_out_question_is_evaluated_once(tmp_path, own_file):
    path = file_of(tmp_path / "q.jsonl", "question")
    test = None
    if own_file:
        # A prompt that comes twice has the same most probable answer twice.
        records = [FORMS["question"](f"<t{n % 6}>", "1") for n in range(9)]
        test = write(tmp_path / "t.jsonl", records)
    questions = QuestionSet(path, BYTES, held_out=0.3, evaluation=test)
    measured = prompts_of(questions, 64, held_out=True)
    assert len(measured) == len(set(measured)) < 40
    assert prompts_of(questions, 3, held_out=True) == measured[:3]
    assert f"{len(measured)} held out" in questions.describe(3)
