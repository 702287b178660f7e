"""Conversations of records: what the system says, and what an assistant thinks."""

import re

import pytest
from marked_records import marked

from rwkv7_jax.data.records.record import parse_record

USER = {"role": "user", "content": "a"}
ASSISTANT = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "Be kind."}


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
    reason = '"system" and message 1, which is of the system too, say different things'
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_record({"system": "Be brief.", **record})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("thought", ["", " ", "\n\n", None])
def test_an_empty_thought_is_none(name, thought):
    answer = {**ASSISTANT, name: thought}
    for think in ("off", "fast"):
        bare = {"messages": [USER, ASSISTANT], "think": think}
        assert marked({**bare, "messages": [USER, answer]}) == marked(bare)
    with pytest.raises(ValueError, match='message 2: must have a "reasoning_content"'):
        parse_record({"messages": [USER, answer], "think": "free"})


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
