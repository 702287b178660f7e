"""Conversations in records: system texts and reasoning."""

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
def test_duplicate_system_texts_merge_and_conflicting_ones_are_rejected(record):
    assert marked({"system": " Be kind.", **record}) == marked(record)
    reason = '"system" and message 1, which also has the role system, differ'
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_record({"system": "Be brief.", **record})


@pytest.mark.parametrize("name", THOUGHTS)
@pytest.mark.parametrize("thought", ["", " ", "\n\n", None])
def test_an_empty_thought_counts_as_absent(name, thought):
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
def test_thoughts_next_to_a_question_belong_to_its_answer(record, name, think):
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


def test_thoughts_under_two_names_are_rejected():
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
def test_ambiguous_thoughts_are_rejected(record, name):
    with pytest.raises(ValueError, match=f'"{name}" next to "[a-z]*": put the'):
        parse_record({name: "hm", **record})
    for nothing in ("", "on", "off", True, None):
        assert marked({name: nothing, **record}) == marked(record)


def test_a_system_text_does_not_put_prompt_answers_in_the_loss():
    record = {
        "system": "Be kind.",
        "prompt": [USER, ASSISTANT, USER],
        "completion": [ASSISTANT],
    }
    assert marked(record) == (
        "[System: Be kind.\n\nUser: a\n\nAssistant:][ b][\n\nUser: a\n\nAssistant:] b"
    )


def test_a_system_text_next_to_a_raw_prompt_is_rejected():
    for name in ("answer", "completion"):
        with pytest.raises(
            ValueError, match='"system" next to a "prompt" that is read'
        ):
            parse_record({"system": "Be kind.", "prompt": "a", name: "b"})
        assert marked({"system": "", "prompt": "a", name: "b"}) == "[a]b"
