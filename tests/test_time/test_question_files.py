"""Questions in the record formats of tuning have the prompts of tuning."""

import json
import re

import pytest

from rwkv7_jax.data.records.questions import ANSWERS, QUESTIONS
from rwkv7_jax.data.records.record import parse_record
from rwkv7_jax.test_time.questions import QuestionSet, read_questions
from rwkv7_jax.text.chat_template import THINK_MODES
from rwkv7_jax.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
WORLD = Tokenizer.world()

USER = {"role": "user", "content": "6 + 6\n\n= ?"}
ASSISTANT = {"role": "assistant", "content": "It is\n#### 12"}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho."}]

ANSWERED = (
    *({question: "6 + 6 = ?", "answer": "#### 12"} for question in QUESTIONS),
    *({"question": "6 + 6 = ?", answer: "#### 12"} for answer in ANSWERS),
    {"input": "6 + 6 = ?", "output": "#### 12"},
    {"human": "6 + 6 = ?", "assistant": "#### 12"},
    {
        "instruction": "Add.",
        "input": "6 + 6",
        "output": "#### 12",
        "history": [["a", "b"]],
    },
    {"problem": "6 + 6 = ?", "solution": "It is #### 12", "answer": "#### 12"},
    {"question": "6 + 6 = ?", "answer": "#### 12", "system": "Be kind."},
    {"messages": [USER, ASSISTANT]},
    {"messages": [*EARLIER, USER, ASSISTANT], "system": "Be kind."},
    [*EARLIER, USER, ASSISTANT],
    {
        "conversations": [
            {"from": "human", "value": "6 + 6"},
            {"from": "gpt", "value": "#### 12"},
        ]
    },
    {
        "conversation": [
            {"human": "a", "assistant": "b"},
            {"human": "c", "assistant": "#### 12"},
        ]
    },
    {"data": ["6 + 6", "#### 12"]},
    {"prompt": "6 + 6", "messages": [{"role": "user", "content": "6 + 6"}, ASSISTANT]},
    {"prompt": [*EARLIER, USER], "completion": [ASSISTANT]},
    {"prompt": [USER], "completion": [EARLIER[1], USER, ASSISTANT]},
)


def read(path, record, tokenizer=BYTES):
    path.write_text(json.dumps(record) + "\n")
    ((prompt, answer),) = read_questions(path, tokenizer)
    return prompt, answer


def tuned_prompt(record, tokenizer):
    """Return the ids before the last answer of the record's tuning document."""
    ids = []
    for segment in parse_record(record).segments[:-1]:
        ids += tokenizer.encode(segment.text.decode())
    return ids


@pytest.mark.parametrize("record", ANSWERED)
@pytest.mark.parametrize("tokenizer", [BYTES, WORLD], ids=lambda t: t.name)
@pytest.mark.parametrize("think", ["off", "fast"])
def test_prompt_ids_match_those_of_tuning(tmp_path, record, tokenizer, think):
    if isinstance(record, dict):
        record = {**record, "think": think}
    prompt, answer = read(tmp_path / "q.jsonl", record, tokenizer)
    assert prompt == tuned_prompt(record, tokenizer)
    assert answer.endswith("#### 12")


@pytest.mark.parametrize("think", THINK_MODES)
def test_a_think_mode_gives_the_prompt_of_answers_with_thoughts(tmp_path, think):
    record = {"question": "a", "answer": "b", "think": think}
    prompt, _ = read(tmp_path / "q.jsonl", record)
    thought = {} if think in ("off", "fast") else {"reasoning": "hm"}
    assert prompt == tuned_prompt({**record, **thought}, BYTES)


def test_messages_may_end_with_the_question_next_to_an_answer_key(tmp_path):
    expected = "User: Hi\n\nAssistant: Ho.\n\nUser: 6 + 6\n= ?\n\nAssistant:"
    path = tmp_path / "q.jsonl"
    for answer in ("12", 12):
        for name in ("messages", "prompt", "conversations"):
            record = {name: [*EARLIER, USER], "answer": answer}
            assert read(path, record) == (BYTES.encode(expected), "12")
        record = {"messages": [*EARLIER, USER, ASSISTANT], "answer": answer}
        assert read(path, record) == (BYTES.encode(expected), "12")
    assert read(path, {"messages": [*EARLIER, USER]}) == (BYTES.encode(expected), "")
    assert read(path, {"question": "a"})[1] == ""


def test_a_raw_prompt_is_kept_verbatim(tmp_path):
    for other in (
        {},
        {"question": "c"},
        {"messages": [USER]},
        {"system": "d", "reasoning": "e"},
    ):
        record = {"prompt": "a\n\nb ", "answer": 7, "completion": "x", **other}
        assert read(tmp_path / "q.jsonl", record) == (BYTES.encode("a\n\nb "), "7")
    assert read(tmp_path / "q.jsonl", {"prompt": "a", "answer": None})[1] == ""
    for name in ("completion", "response", "output"):
        for other in ({}, {"answer": None}):
            record = {"prompt": "a", name: "x", **other}
            assert read(tmp_path / "q.jsonl", record) == (BYTES.encode("a"), "x")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"answer": "a"}, 'must have a "prompt", a "question" or "messages"; its keys'),
        ({"text": "a"}, 'must have a "prompt", a "question" or "messages"; its keys'),
        ({"messages": [], "answer": "a"}, '"messages" must be a list of messages'),
        ({"messages": [ASSISTANT]}, '"messages" must end with a question, or with its'),
        (
            {"messages": [USER, ASSISTANT, ASSISTANT]},
            '"messages" must end with a question',
        ),
        ({"question": "a", "query": "b"}, '"question" and "query" in one object'),
        ({"prompt": "a", "response": "b", "output": "c"}, '"response" and "output" in'),
        (
            {"question": "a", "output": "b", "answer": "c"},
            '"output" and "answer" in one',
        ),
        ({"question": 7}, '"question" must be a string; got int'),
        ({"question": "a", "think": "deep"}, '"think": a think mode must be one of'),
        (
            {"messages": [USER], "conversation": []},
            '"messages" and "conversation" in one',
        ),
    ],
)
def test_a_line_without_a_question_is_rejected(tmp_path, record, reason):
    with pytest.raises(ValueError, match=rf"q\.jsonl:1: {re.escape(reason)}"):
        read(tmp_path / "q.jsonl", record)


def questions_of(path, record, verifier):
    path.write_text(json.dumps(record) + "\n")
    questions = QuestionSet(str(path), BYTES, verifier=verifier)
    assert questions.can_be_answered
    return questions, questions.prompts(0, 1)[0]


@pytest.mark.parametrize(
    ("verifier", "answer", "right", "wrong"),
    [
        ("exact", "12", " 12", " 123"),
        ("hash_number", "6 + 6 = 12\n#### 12", " so\n#### 12", " 12"),
        ("last_number", "It is 12.", " 6 + 6 is 12", " 12 or 13"),
        ("letter", "B", " B", " C"),
    ],
)
@pytest.mark.parametrize("think", THINK_MODES)
def test_the_answer_is_read_after_the_thoughts(
    tmp_path, verifier, answer, right, wrong, think
):
    record = {"question": "q", "answer": answer, "think": think}
    questions, prompt = questions_of(tmp_path / "q.jsonl", record, verifier)
    # How a completion begins under each mode, after what the prompt ends with.
    begin = {"off": "", "fast": ">\n"}.get(think, f">\n A? {wrong}\n</think>\n")
    assert questions.reward(prompt, BYTES.encode(begin + right)) == 1.0
    assert questions.reward(prompt, BYTES.encode(begin + wrong)) == 0.0
    votes = [
        questions.given_answer(BYTES.encode(begin + text)) for text in (right, wrong)
    ]
    again = questions.given_answer(BYTES.encode(begin + right + " "))
    assert votes[0] == again != votes[1]
    if think not in ("off", "fast"):
        assert questions.reward(prompt, BYTES.encode(f">\n{right}")) == 0.0


def test_unrequested_thoughts_are_not_part_of_the_answer(tmp_path):
    record = {"question": "q", "answer": "<think>\nhm\n</think>\n12"}
    questions, prompt = questions_of(tmp_path / "q.jsonl", record, "exact")
    for text in (" 12", " <think>\n13\n</think>\n12"):
        assert questions.reward(prompt, BYTES.encode(text)) == 1.0
    raw = {"prompt": "q:", "answer": "12"}
    questions, prompt = questions_of(tmp_path / "q.jsonl", raw, "exact")
    assert questions.reward(prompt, BYTES.encode("<think></think>12")) == 0.0
