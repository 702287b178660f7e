"""RWKV-7's chat templates give the same text in training data, prompts and Jinja."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv7_jax.data.records.conversations import conversation
from rwkv7_jax.data.records.record import parse_record
from rwkv7_jax.text.chat_template import (
    CHAT_STOP,
    THINK_MODES,
    Message,
    chat_prompt,
    clean_message,
    read_tools,
    tool_text,
    without_thoughts,
    write_conversation,
)
from rwkv7_jax.text.jinja_template import chat_template_jinja


def test_a_prompt_equals_the_training_text_before_the_answer():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]
    document = conversation(messages)
    prompt, answer = (segment.text for segment in document.segments)
    assert chat_prompt(b" Hi\n") == prompt == b"User: Hi\n\nAssistant:"
    assert answer == b" Hello."


def test_the_stop_string_begins_the_next_turn_of_training_data():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "I."},
    ]
    document = conversation(messages)
    following = document.segments[2].text
    assert following.startswith(CHAT_STOP.encode())


def test_a_prompt_may_contain_any_bytes():
    assert chat_prompt(b"\xff\xfe") == b"User: \xff\xfe\n\nAssistant:"


@pytest.mark.parametrize(
    "message",
    [
        "a\n\nb",
        "a\r\n\r\nb\r\n",
        "a \n \t\n\n b",
        "\n\na\n",
        "a\nb",
        "\u3000a\u2003\n\u00a0\nb\u3000",
        "1.\n\n2.\n\n\n\n3.",
        "",
    ],
)
def test_prompts_and_training_data_are_cleaned_alike(message):
    turns = [
        {"role": "user", "content": message},
        {"role": "assistant", "content": "x"},
    ]
    prompt, _ = (segment.text for segment in conversation(turns).segments)
    assert chat_prompt(message.encode()) == prompt


def published(text: str) -> str:
    """Read a line of the published list, which escapes line breaks."""
    return text.replace("\\n", "\n")


@pytest.mark.parametrize(
    ("think", "text"),
    [
        ("off", r"User: xxx\n\nAssistant:"),
        ("fast", r"User: xxx\n\nAssistant: <think>\n</think"),
        ("free", r"User: xxx\n\nAssistant: <think"),
        ("medium", r"User: xxx (think)\n\nAssistant: <think"),
        ("short", r"User: xxx (think a bit)\n\nAssistant: <think"),
        ("long", r"User: xxx (think a lot)\n\nAssistant: <think"),
    ],
)
def test_prompts_match_the_published_ones(think, text):
    assert chat_prompt(b"xxx", think=think).decode() == published(text)
    begin = published(r"System: yyy\n\n")
    prompt = chat_prompt(b"xxx", think=think, system=b"yyy").decode()
    assert prompt == begin + published(text)


SLOTS = {
    "name": "find_free_slots",
    "description": "Find free calendar slots",
    "arguments": {"date": {"type": "string"}, "minutes": {"type": "integer"}},
}
EVENT = {"name": "create_event", "arguments": {"title": {"type": "string"}}}
CALL = {"name": "find_free_slots", "arguments": {"date": "2026-05-08", "minutes": 30}}


def test_tools_calls_and_results_match_the_published_template():
    turns = [
        Message("user", "Schedule a sync with Bob."),
        Message("assistant", calls=(json.dumps(CALL, separators=(",", ":")),)),
        Message("tool", '{"free_slots":[]}'),
    ]
    tools = [tool_text(SLOTS), tool_text(EVENT)]
    parts = write_conversation(turns, tools=tools, ask=True)
    assert "".join(part.text for part in parts) == published(
        r"System: Tools:\n[\n"
        r'{"name":"find_free_slots","description":"Find free calendar slots","arguments":'
        r'{"date":{"type":"string"},"minutes":{"type":"integer"}}},\n'
        r'{"name":"create_event","arguments":{"title":{"type":"string"}}}\n]\n'
        r"Return only a JSON function call.\n\n"
        r"User: Schedule a sync with Bob.\n\n"
        r"Assistant: ```json\n"
        r'{"name":"find_free_slots","arguments":{"date":"2026-05-08","minutes":30}}\n```\n\n'
        r'User: Function output:\n{"free_slots":[]}\n\nAssistant: ```json'
    )
    assert [part.is_answer for part in parts] == [False, True, False]
    assert parts[1].text.startswith('\n{"name"')


def test_openai_tools_are_written_in_the_short_form():
    parameters = {"type": "object", "properties": SLOTS["arguments"], "required": []}
    function = {"name": SLOTS["name"], "description": SLOTS["description"]}
    openai = {
        "type": "function",
        "function": {**function, "parameters": parameters, "strict": True},
    }
    assert tool_text(openai) == tool_text(SLOTS)
    assert tool_text({"name": "now"}) == '{"name":"now","arguments":{}}'


@pytest.mark.parametrize("think", THINK_MODES)
@pytest.mark.parametrize("with_tools", [False, True])
def test_prompts_equal_training_text_in_every_think_mode(think, with_tools):
    answer = {"role": "assistant", "content": "Hello."}
    if THINK_MODES[think].filler is None:
        answer["reasoning_content"] = "Hm.\n\nYes."
    if with_tools:
        answer = {**answer, "content": "", "tool_calls": [{"function": CALL}]}
    record = {
        "messages": [{"role": "user", "content": " Hi\n"}, answer],
        "think": think,
        "tools": [SLOTS] if with_tools else [],
    }
    document = parse_record(record)
    tools = [tool_text(SLOTS)] if with_tools else []
    prompt, rest = document.segments
    # Where an answer that does not think must call, its beginning is given.
    given = chat_prompt(b"Hi", think=think, tools=tools).removeprefix(prompt.text)
    assert given == (b" ```json" if with_tools and think == "off" else b"")
    assert rest.text.startswith(given)
    assert not prompt.in_loss and rest.in_loss
    expected = {"off": b" Hello.", "fast": b">\nHello."}
    whole = expected.get(think, b">\nHm.\nYes.\n</think>\nHello.")
    if not with_tools:
        assert rest.text == whole


def test_a_question_has_the_think_suffix_if_its_answer_has_a_thought():
    turns = [
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d", thought="e"),
        Message("user", "f"),
    ]
    parts = write_conversation(turns, think="short", ask=True)
    assert "".join(part.text for part in parts) == (
        "User: a\n\nAssistant: b\n\nUser: c (think a bit)\n\n"
        "Assistant: <think>\ne\n</think>\nd\n\nUser: f (think a bit)\n\nAssistant: <think"
    )


@pytest.mark.parametrize("think", THINK_MODES)
def test_optional_tools_change_only_the_system_text(think):
    call = json.dumps(CALL, separators=(",", ":"))
    turns = [
        Message("user", "a"),
        Message("assistant", calls=(call,)),
        Message("tool", "1"),
    ]
    tools = [tool_text(SLOTS)]
    choices = {"think": think, "ask": True}
    with_tools = write_conversation(turns, tools=tools, must_call=False, **choices)
    system, *texts = [part.text for part in with_tools]
    plain = [part.text for part in write_conversation(turns, **choices)]
    assert system.startswith("System: Tools:\n") and system.endswith(plain[0])
    assert texts == plain[1:]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"think": "hard"},
            r'"think": a think mode must be one of off, .*; got \'hard\'',
        ),
        ({"think": 3}, r'"think": a think mode must be one of off, fast'),
        (
            {"think": "long"},
            r'message 2: must have a "reasoning_content", or begin with',
        ),
        ({"tools": {}}, None),
        ({"tools": {"a": 1}}, r'"tools": must be a list of functions; got dict'),
        ({"tools": "["}, r'"tools": not JSON: '),
        ({"tools": [3]}, r'"tools": a tool must be an object with a "name"; got 3'),
        (
            {"tools": [{"name": "f", "arguments": 3}]},
            'arguments of "f" must be an object',
        ),
        (
            {"tools": [{"name": "f", "arguments": {"a": float("nan")}}]},
            '"tools": .*not JSON compliant',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": 3}]}]},
            'message 1: a call must be an object with a "name"',
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"name": "f", "arguments": "{"}],
                    }
                ]
            },
            'message 1: the arguments of "f" must be JSON; got',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": 3}]},
            'message 1: "tool_calls" must be a list',
        ),
        *(
            (
                {"messages": [{"role": "assistant", "function_call": call}]},
                'message 1: the arguments of "f" must be JSON; got',
            )
            for call in (
                {"name": "f", "arguments": '{"a":NaN}'},
                {"name": "f", "arguments": '{"a":1e999}'},
                {"name": "f", "arguments": "[" * 100_000},
            )
        ),
        (
            {"messages": [{"role": "assistant", "content": " \n", "tool_calls": []}]},
            "message 1: an empty answer",
        ),
    ],
)
def test_a_bad_chat_record_has_one_reason(record, reason):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    if reason is None:
        parse_record({"messages": messages, **record})
        return
    with pytest.raises(ValueError, match=reason):
        parse_record({"messages": messages, **record})


def test_a_call_that_is_nested_too_deeply_has_one_reason():
    """Encoding JSON needs more stack than decoding it; the limit depends on the Python version."""

    def is_rejected(depth):
        arguments = {}
        for _ in range(depth):
            arguments = {"a": arguments}
        call = {"name": "f", "arguments": arguments}
        answer = {"role": "assistant", "tool_calls": [call]}
        try:
            parse_record({"messages": [{"role": "user", "content": "a"}, answer]})
        except ValueError as error:
            assert "nested too deeply" in str(error)
            return True
        return False

    assert not is_rejected(100)
    assert is_rejected(100_000)
    # Python 3.11 and 3.12 have their limits among these.
    for depth in range(900, 1600, 5):
        is_rejected(depth)


def test_tools_may_be_a_json_string():
    assert read_tools(json.dumps([SLOTS])) == (tool_text(SLOTS),)


# Conversations as `transformers` takes them, with functions or None.
CONVERSATIONS = {
    "question": ([{"role": "user", "content": "Hi"}], None),
    "system": (
        [
            {"role": "system", "content": "Be\n\nkind. "},
            {"role": "user", "content": "Hi"},
        ],
        None,
    ),
    "empty system and functions": (
        [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}],
        [SLOTS],
    ),
    "system and functions": (
        [{"role": "system", "content": "Kind"}, {"role": "user", "content": "Hi"}],
        [SLOTS, EVENT],
    ),
    "functions": ([{"role": "user", "content": "Hi \u00e9"}], [{"function": SLOTS}]),
    "functions alone": ([], [SLOTS]),
    "two rounds": (
        [
            {"role": "user", "content": "a\r\n\r\nb"},
            {"role": "assistant", "content": "c  \n \t\n  d"},
            {"role": "user", "content": "e"},
        ],
        None,
    ),
    "thoughts": (
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "reasoning_content": " x\n\ny "},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "<think>\nx\n</think>\nd"},
            {"role": "user", "content": "e"},
            {"role": "assistant", "content": "f"},
            {"role": "user", "content": "g"},
        ],
        None,
    ),
    "calls": (
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]},
            {"role": "tool", "content": '{"a": "\u4f60"}\n\n'},
            {
                "role": "assistant",
                "content": "Both.",
                "tool_calls": [
                    CALL,
                    {"function": {"name": "now", "arguments": '{"a": [1]}'}},
                ],
            },
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
        ],
        [SLOTS, {"type": "function", "function": {"name": "now", "parameters": {}}}],
    ),
    "empty thoughts": (
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "reasoning_content": ""},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d", "reasoning_content": " \n"},
            {"role": "user", "content": "e"},
            {
                "role": "assistant",
                "content": "<think>\nx\n</think>\nf",
                "reasoning_content": "",
            },
        ],
        None,
    ),
    "thoughts that were cut": (
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "reasoning_content": "b"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "d"},
        ],
        None,
    ),
    "blank lines in a call": (
        [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"name": "f", "arguments": '\n{\n\n "a":\n \n1}\n'}],
            },
        ],
        None,
    ),
    "nulls": (
        [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": None,
                "tool_calls": [{"name": "now", "arguments": None, "function": None}],
            },
        ],
        [
            {"name": "f", "description": None, "arguments": None, "function": None},
            {"function": {"name": "g", "parameters": {"properties": None}}},
            {"function": {"name": "h", "parameters": None}},
        ],
    ),
    "calls after thoughts": (
        [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "reasoning_content": "t",
                "content": "",
                "tool_calls": [{"function": CALL}],
            },
        ],
        [SLOTS],
    ),
}


def ours(messages, tools, think, ask):
    """Write a conversation from the same objects with our functions."""
    from rwkv7_jax.data.records.conversations import read_message

    turns = [
        read_message(message, number) for number, message in enumerate(messages, 1)
    ]
    texts = [tool_text(tool) for tool in tools or []]
    parts = write_conversation(turns, think=think, tools=texts, ask=ask)
    return "".join(part.text for part in parts)


def in_jinja(messages, tools, ask, **choices):
    """Render a conversation as `transformers` does."""
    pytest.importorskip("jinja2", reason="the oracle extra is not installed")
    utils = pytest.importorskip(
        "transformers.utils.chat_template_utils",
        reason="the oracle extra is not installed",
    )
    template = utils._compile_jinja_template(chat_template_jinja())
    return template.render(
        messages=messages, tools=tools, add_generation_prompt=ask, **choices
    )


@pytest.mark.parametrize("ask", [True, False], ids=["ask", "complete"])
@pytest.mark.parametrize("think", THINK_MODES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_jinja_template_matches_ours(name, think, ask):
    messages, tools = CONVERSATIONS[name]
    expected = ours(messages, tools, think, ask)
    assert in_jinja(messages, tools, ask, think=think) == expected


def test_enable_thinking_selects_free_or_fast():
    messages, tools = CONVERSATIONS["question"]
    for switch, think in (({}, "off"), (True, "free"), (False, "fast")):
        choices = {} if switch == {} else {"enable_thinking": switch}
        expected = ours(messages, tools, think, True)
        assert in_jinja(messages, tools, True, **choices) == expected
    with pytest.raises(Exception, match="think must be one of off, fast, free"):
        in_jinja(messages, tools, True, think="hard")
    with pytest.raises(
        Exception, match="role must be system, user, assistant, tool; got"
    ):
        in_jinja([{"role": "bot", "content": ""}], None, True)


def test_an_unknown_role_is_named():
    with pytest.raises(ValueError, match=r"a role must be one of system, .* got 'bot'"):
        write_conversation([Message("bot", "a")])


def test_only_the_thoughts_of_the_last_turn_are_removed():
    thought = "User: a\n\nAssistant: <think"
    assert without_thoughts(thought, ">\nhm\n</think>\nb") == "\nb"
    # A verbatim prompt may go on in another form after an answer with thoughts.
    prompt = f"{thought}>\nhm\n</think>\nb\n\nQ: c\nA:"
    assert without_thoughts(prompt, " d") == " d"


@pytest.mark.parametrize("think", THINK_MODES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_blank_lines_occur_only_between_turns(name, think):
    messages, tools = CONVERSATIONS[name]
    for turn in ours(messages, tools, think, True).split("\n\n"):
        assert turn.startswith(("System:", "User:", "Assistant:"))


@settings(max_examples=150)
@given(st.text(st.sampled_from("ab \n\r\t\x0b\x1c\x85\u00a0\u2028\u3000"), max_size=30))
def test_the_jinja_template_cleans_messages_like_ours(text):
    messages = [{"role": "user", "content": text}]
    rendered = in_jinja(messages, None, False)
    assert rendered == f"User: {clean_message(text)}"
