"""Conversations of records: what the system says, and what an assistant thinks."""

import re

import pytest
from marked_records import marked

from rwkv7_jax.data.records.record import parse_record

USER = {"role": "user", "content": "a"}
ASSISTANT = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "Be kind."}

THOUGHTS = ("reasoning_content", "reasoning", "thinking")


# Each a conversation of one question, into which a system text is put.
RECORDS = (
    {"messages": [USER, ASSISTANT]},
    {"prompt": "a", "messages": [USER, ASSISTANT]},
    {"conversations": [USER, ASSISTANT]},
    {"data": ["a", "b"]},
    {"prompt": [USER], "completion": [ASSISTANT]},
    {"instruction": "a", "output": "b"},
    {"question": "a", "answer": "b"},
)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_text_comes_before_every_conversation(record, name):
    for text in ("Be kind.\n", [{"type": "text", "text": "Be kind."}]):
        assert marked({name: text, **record}) == (
            "[System: Be kind.\n\nUser: a\n\nAssistant:] b"
        )
    for nothing in ("", None, []):
        assert marked({name: nothing, **record}) == "[User: a\n\nAssistant:] b"
    with pytest.raises(ValueError, match=f'"{name}" must be a string; got int'):
        parse_record({name: 7, **record})


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [SYSTEM, USER, ASSISTANT]},
        {"conversations": [SYSTEM, USER, ASSISTANT]},
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
    ],
)
def test_of_two_system_texts_equal_ones_are_one_and_others_are_refused(record):
    assert marked({"system": " Be kind.", **record}) == marked(record)
    reason = '"system" and message 1, which also has the role system, differ'
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_record({"system": "Be brief.", **record})


@pytest.mark.parametrize("name", THOUGHTS)
@pytest.mark.parametrize("thought", ["", " ", "\n\n", None])
def test_an_empty_thought_is_none(name, thought):
    answer = {**ASSISTANT, name: thought}
    for think in ("off", "fast"):
        bare = {"messages": [USER, ASSISTANT], "think": think}
        assert marked({**bare, "messages": [USER, answer]}) == marked(bare)
    with pytest.raises(ValueError, match='message 2: must have a "reasoning_content"'):
        parse_record({"messages": [USER, answer], "think": "free"})


ANSWERS = ("output", "answer", "response")

QUESTIONS = (
    {"instruction": "a", "output": "b"},
    {"instruction": "a", "input": "", "output": "b", "history": []},
    {"question": "a", "answer": "b"},
    {"query": "a", "response": "b"},
)


@pytest.mark.parametrize("record", QUESTIONS)
@pytest.mark.parametrize("name", THOUGHTS)
@pytest.mark.parametrize("think", ["off", "fast", "free", "long"])
def test_thoughts_beside_a_question_are_those_of_its_answer(record, name, think):
    for thought in ("hm", "  hm\n\n\nwell\n"):
        answer = {**ASSISTANT, name: thought}
        expected = {"messages": [USER, answer], "think": think}
        assert marked({name: thought, "think": think, **record}) == marked(expected)
    for nothing in ("", " \n", None, "on", "Off", "True", True, False, 0, []):
        assert marked({name: nothing, **record}) == marked(record)
    with pytest.raises(ValueError, match=f'message 2: "{name}" must be a string; got'):
        parse_record({name: ["hm"], **record})
    begun = {key: "<think>c" if key in ANSWERS else record[key] for key in record}
    assert marked(begun).endswith("<think>c")
    reason = f'message 2: "{name}", and an answer that begins with <think'
    with pytest.raises(ValueError, match=reason):
        parse_record({name: "hm", **begun})


def test_thoughts_under_two_names_are_not_guessed():
    reason = 'message 2: "reasoning" and "thinking" in one object'
    for record in QUESTIONS:
        with pytest.raises(ValueError, match=reason):
            parse_record({"reasoning": "hm", "thinking": "well", **record})


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [USER, ASSISTANT]},
        {"data": ["a", "b"]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "answer": "b"},
    ],
)
@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts_that_may_be_of_any_answer_are_refused(record, name):
    with pytest.raises(ValueError, match=f'"{name}" next to "[a-z]*": put the'):
        parse_record({name: "hm", **record})
    for nothing in ("", "on", "off", True, None):
        assert marked({name: nothing, **record}) == marked(record)


def test_an_answer_that_was_only_read_stays_so_after_a_system_text():
    record = {
        "system": "Be kind.",
        "prompt": [USER, ASSISTANT, USER],
        "completion": [ASSISTANT],
    }
    assert marked(record) == (
        "[System: Be kind.\n\nUser: a\n\nAssistant:][ b][\n\nUser: a\n\nAssistant:] b"
    )


def test_a_system_text_next_to_a_prompt_as_it_stands_is_refused():
    for name in ("answer", "completion"):
        with pytest.raises(
            ValueError, match='"system" next to a "prompt" that is read'
        ):
            parse_record({"system": "Be kind.", "prompt": "a", name: "b"})
        assert marked({"system": "", "prompt": "a", name: "b"}) == "[a]b"
