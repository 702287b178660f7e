"""Answers parsed from the template: thoughts, content and calls, whatever the chunks."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rwkv7_jax.data.records.conversations import read_message
from rwkv7_jax.text.chat_answers import (
    AnswerParts,
    AnswerReader,
    ToolCall,
    read_answer,
)
from rwkv7_jax.text.chat_template import (
    THINK_MODES,
    Message,
    call_text,
    clean_message,
    compact_json,
    tool_text,
    turn_start,
    write_conversation,
)

TOOLS = (
    tool_text({"name": "find", "arguments": {"date": {"type": "string"}}}),
    tool_text({"name": "now"}),
)
CALL = '```json\n{"name":"find","arguments":{"date":"x"}}\n```'
FOUND = ToolCall("find", '{"date":"x"}')
NOW = ToolCall("now", "{}")

# What answers of the template are made of, and what looks like it.
FRAGMENTS = st.sampled_from(
    [
        *("<think", "<think>", "</think>", "</think", "<", "```", "```json", "\n```"),
        *("`", "json", " ", "\n", "a", "b c", CALL, "</", ">", "[", "]", "\u00e9"),
        *('{"name":"now"}', '{"name":"now","arguments":{}}', ","),
    ]
)
ANSWERS = st.lists(FRAGMENTS, max_size=12).map("".join)

_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()
)
_VALUES = st.recursive(
    _SCALARS.filter(lambda value: value not in (float("inf"), float("-inf"))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=6,
)
CALLS = st.builds(
    ToolCall,
    st.sampled_from(["find", "now"]),
    st.dictionaries(st.text(), _VALUES, max_size=3).map(compact_json),
)
TEXTS = st.text(st.sampled_from("ab<>/`{}[] \n\u00e9\U0001f600"), max_size=20)
THOUGHTS = TEXTS.map(clean_message).filter(lambda text: "</think>" not in text)
WORDS = TEXTS.map(clean_message)


def answer_text(message, **how):
    """Return the text of the last turn after the speaker's colon."""
    parts = write_conversation([Message("user", "q"), message], **how)
    text = "".join(part.text for part in parts)
    return text.rpartition(turn_start("assistant"))[2]


@settings(max_examples=300)
@given(
    THOUGHTS,
    WORDS,
    st.lists(CALLS, max_size=3),
    st.sampled_from(sorted(THINK_MODES)),
    st.booleans(),
)
def test_answers_round_trip(thought, words, calls, think, must_call):
    texts = tuple(
        call_text({"name": call.name, "arguments": call.arguments}) for call in calls
    )
    message = Message("assistant", words, thought, texts)
    text = answer_text(message, think=think, tools=TOOLS, must_call=must_call)
    assert read_answer(text, TOOLS) == (thought, words, tuple(calls))


def pieces(text, cuts):
    """Split the text at the cuts."""
    ends = [0, *sorted(cuts), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(ends)]


def read_in(texts, tools=TOOLS, *, parallel=True):
    """Return what a reader gives for each chunk and at the end."""
    reader = AnswerReader(tools, parallel=parallel)
    said = [reader.push(text) for text in texts]
    said.append(reader.close())
    assert reader.calls_read == sum(len(parts.calls) for parts in said)
    return said


def joined(said):
    return AnswerParts(
        "".join(parts.thought for parts in said),
        "".join(parts.words for parts in said),
        tuple(call for parts in said for call in parts.calls),
    )


@settings(max_examples=300)
@given(ANSWERS, st.data(), st.booleans(), st.booleans())
def test_parts_do_not_depend_on_the_chunks(text, data, with_tools, parallel):
    tools = TOOLS if with_tools else ()
    cuts = data.draw(st.sets(st.integers(0, len(text)), max_size=8))
    whole = read_answer(text, tools, parallel=parallel)
    for texts in (pieces(text, cuts), list(text)):
        assert joined(read_in(texts, tools, parallel=parallel)) == whole
    if not parallel:
        assert len(whole.calls) <= 1


@settings(max_examples=300)
@given(ANSWERS)
@example("<think><think>a</think>\n<think>b</think>\n<think>c")
def test_a_parsed_answer_can_be_sent_back_as_a_message(text):
    thought, words, calls = read_answer(text, TOOLS)
    functions = [
        {"name": call.name, "arguments": call.arguments, "id": "x"} for call in calls
    ]
    message = {
        "role": "assistant",
        "content": words,
        "reasoning_content": thought,
        "tool_calls": functions,
    }
    turn = read_message(message, 1)
    assert (turn.thought or "") == clean_message(thought)
    again = write_conversation([turn, Message("user", "q")])
    assert "".join(part.text for part in again).count("\n\n") == 1


@given(ANSWERS)
def test_without_tools_the_content_follows_the_thoughts(text):
    """Find them in another way, for texts with one thought."""
    thought, words, calls = read_answer(text)
    assert calls == ()
    stripped = text.lstrip()
    if not stripped.startswith("<think"):
        assert (thought, words) == ("", text.removeprefix(" "))
        return
    inside, mark, rest = stripped.removeprefix("<think").partition("</think>")
    if not rest.lstrip().startswith("<think"):
        assert words == rest.lstrip()
        expected = inside.removeprefix(">").strip()
        if mark:
            assert thought == expected
        else:
            assert expected.startswith(thought)
            assert "</think".startswith(expected[len(thought) :].strip())


@pytest.mark.parametrize(
    ("text", "thought", "words", "calls"),
    [
        ("", "", "", ()),
        (" a \n", "", "a \n", ()),
        ("\n a", "", "\n a", ()),
        (" <thin", "", "<thin", ()),
        (" <think", "", "", ()),
        (" <think>\n</think", "", "", ()),
        (" <think>\n</think>\nb", "", "b", ()),
        (" <think></think>b", "", "b", ()),
        (" <think>\nx\n\ny \n</think>\n\nb\n", "x\n\ny", "b\n", ()),
        (" <think>\nx </thi", "x", "", ()),
        (" <think>x</thought>y", "x</thought>y", "", ()),
        (" <think>x</think>\n<think>y</think>z", "x\ny", "z", ()),
        (f" {CALL}", "", "", (FOUND,)),
        (f" {CALL[:-4]}", "", "", (FOUND,)),
        (f" {CALL[:-6]}", "", CALL[:-6], ()),
        (f" a\n{CALL}\n", "", "a", (FOUND,)),
        (f" a\n{CALL}\nb\n{CALL}", "", "a\n\nb", (FOUND, FOUND)),
        (f" <think>x</think>\n{CALL}", "x", "", (FOUND,)),
        (f" <think>{CALL}", CALL, "", ()),
        (' ```json\n{\n "name": "now"\n}\n```', "", "", (NOW,)),
        (' ```json\n[{"name":"now"},{"name":"now"}]\n```', "", "", (NOW, NOW)),
        # A block that is not complete does not hide the next one.
        (f" a ```json b\n{CALL}", "", "a ```json b", (FOUND,)),
    ],
)
def test_answers_are_split_into_thought_content_and_calls(text, thought, words, calls):
    assert read_answer(text, TOOLS) == (thought, words, calls)


@pytest.mark.parametrize(
    "block",
    [
        "",
        "{}",
        "[]",
        "3",
        '"now"',
        "now()",
        '{"name":"now"',
        '{"name":"other","arguments":{}}',
        '{"name":["now"],"arguments":{}}',
        '{"name":"now","arguments":[]}',
        '{"name":"now","arguments":"{}"}',
        '{"name":"now","arguments":null}',
        '{"name":"now","description":"","arguments":{}}',
        '{"arguments":{}}',
        '[{"name":"now"},{"name":"other"}]',
        '{"name":"now","arguments":{"a":NaN}}',
        '{"name":"now","arguments":{"a":1e999}}',
        '{"name":"now","arguments":{"a":"\\ud800"}}',
        '{"name":"now","arguments":{"\\ud800":1}}',
        '{"name":"now","arguments":{"a":' + "[" * 100_000 + "}}",
        '{"name":"now","arguments":{"a":' + "9" * 5_000 + "}}",
        "```json",
    ],
    ids=lambda block: block[:40],
)
def test_an_invalid_call_block_stays_text(block):
    text = f"a\n```json\n{block}\n``` b\n"
    assert read_answer(f" {text}", TOOLS) == ("", text, ())


def test_without_tools_a_call_stays_text():
    assert read_answer(f" a\n{CALL}\n") == ("", f"a\n{CALL}\n", ())


def test_a_limit_of_one_call_keeps_the_first():
    two = '```json\n[{"name":"now"},{"name":"now"}]\n```'
    said = read_answer(f" {two}\n{CALL}\n{CALL}", TOOLS, parallel=False)
    assert said == ("", f"{two}\n\n{CALL}", (FOUND,))


def test_text_is_streamed_as_soon_as_it_is_unambiguous():
    said = read_in(
        ["<think>\nab", " c", "</th", "at </think>", "\nd", " e\n", "``", "f"]
    )
    assert [parts.thought for parts in said[:4]] == ["ab", " c", "", "</that"]
    assert [parts.words for parts in said[4:]] == ["d", " e", "", "\n``f", ""]
    said = read_in(["a", "\n", *CALL, "b"])
    assert [parts.calls for parts in said if parts.calls] == [(FOUND,)]
    assert said[-3].calls == (FOUND,)


def test_many_thoughts_and_fences_are_parsed_without_recursion():
    count = 5_000
    text = "<think>a</think>" * count + "```json" * count
    thought, words, _ = read_answer(text, TOOLS)
    assert thought == "\n".join("a" * count) and words == "```json" * count


def test_arguments_are_rewritten_as_equal_json():
    block = '{"name": "find", "arguments": {"date": "\\u00e9\\n", "n": 1.50}}'
    (call,) = read_answer(f"```json\n{block}\n```", TOOLS).calls
    assert json.loads(call.arguments) == {"date": "\u00e9\n", "n": 1.5}
    assert call.arguments == '{"date":"\u00e9\\n","n":1.5}'
