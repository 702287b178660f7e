"""Fields of a chat: think modes, functions, and messages with function calls."""

import pytest

from rwkv7_jax.data.records.conversations import asked_conversation
from rwkv7_jax.data.records.record import parse_record
from rwkv7_jax.serving.chats import EFFORTS, read_chat
from rwkv7_jax.serving.fields import Fields, Refused
from rwkv7_jax.text.chat_answers import read_answer
from rwkv7_jax.text.chat_template import THINK_MODES, answer_opening, tool_text
from rwkv7_jax.text.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]
FIND = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds.",
        "parameters": {"type": "object", "properties": {"date": {"type": "string"}}},
    },
}


def chat_of(**body):
    fields = Fields({"messages": HI} | body)
    chat = read_chat(fields)
    fields.refuse_others()
    return chat


def prompt_of(**body):
    return "".join(chat_of(**body).parts)


def test_a_reasoning_effort_selects_a_think_mode():
    assert EFFORTS.keys() == {"none", "minimal", "low", "medium", "high"}
    for effort, think in EFFORTS.items():
        assert chat_of(reasoning_effort=effort) == chat_of(think=think)
        both = chat_of(reasoning_effort=effort, think=think)
        assert both == chat_of(think=think)
        assert both.opening == answer_opening(think)


def test_enable_thinking_selects_free_or_fast_and_agrees_with_think_modes():
    for switch, think in ((True, "free"), (False, "fast"), (None, "off")):
        variables = {"enable_thinking": switch}
        assert chat_of(chat_template_kwargs=variables) == chat_of(think=think)
    assert chat_of(chat_template_kwargs={}) == chat_of()
    for think, mode in THINK_MODES.items():
        variables = {"enable_thinking": mode.filler is None}
        asked = chat_of(think=think, chat_template_kwargs=variables)
        assert asked == chat_of(think=think)


def test_functions_are_in_the_prompt_and_the_model_chooses():
    chat = chat_of(tools=[FIND], messages=[{"role": "system", "content": "s"}, *HI])
    assert "".join(chat.parts) == (
        f"System: s\nTools:\n[\n{tool_text(FIND)}\n]\nReturn only a JSON function call.\n\n"
        "User: hi\n\nAssistant:"
    )
    assert (chat.opening, chat.tools, chat.parallel) == ("", (tool_text(FIND),), True)
    assert chat_of(tools=[FIND], tool_choice="auto") == chat_of(tools=[FIND])
    thinking = chat_of(tools=[FIND], think="short")
    assert "".join(thinking.parts).endswith("hi (think a bit)\n\nAssistant: <think")
    assert not chat_of(tools=[FIND], parallel_tool_calls=False).parallel


CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "function": {"name": "find", "arguments": "{}"}}
    ],
}
ANSWERS = {"words": {"role": "assistant", "content": "Hello."}, "call": CALLED}


@pytest.mark.parametrize("think", THINK_MODES)
@pytest.mark.parametrize(
    ("tools", "last"), [([], "words"), ([FIND], "words"), ([FIND], "call")]
)
def test_a_chat_prompt_has_the_ids_of_tuning(think, tools, last):
    turns = [*HI, CALLED, {"role": "tool", "content": "1"}] if tools else HI
    if THINK_MODES[think].filler is None:
        thought = {"reasoning_content": "Hm."}
        turns = [turn | thought if turn == CALLED else turn for turn in turns]
        answer = ANSWERS[last] | thought
    else:
        answer = ANSWERS[last]
    record = {"messages": [*turns, answer], "think": think, "tools": tools}
    learnt = [part.text for part in parse_record(record).segments]
    chat = chat_of(messages=turns, think=think, tools=tools)
    tokenizer = Tokenizer.world()
    asked = [tokenizer.encode(part) for part in chat.parts]
    assert asked == [tokenizer.encode(part) for part in learnt[:-1]]
    # All of a call is the model's to write, and its answer is what the server reads.
    read = read_answer(chat.opening + learnt[-1].decode(), chat.tools)
    assert read.words == (answer["content"] or "")
    assert [call.name for call in read.calls] == ["find"] * (last == "call")
    prompt, _ = asked_conversation(
        record["messages"], think=think, tools=list(chat.tools)
    )
    assert prompt == chat.parts


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [FIND], "tool_choice": "none"},
        {"tools": []},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": None, "tool_choice": None, "parallel_tool_calls": None},
        {"functions": [], "function_call": "auto"},
        {"reasoning_effort": "none"},
        {"reasoning_effort": None, "think": None, "chat_template_kwargs": None},
    ],
)
def test_without_functions_and_thoughts_nothing_changes(body):
    assert chat_of(**body) == chat_of()


def call(name, id=None, **arguments):
    text = str(arguments).replace("'", '"')
    made = {"type": "function", "function": {"name": name, "arguments": text}}
    return made if id is None else made | {"id": id}


def calling(*calls, **fields):
    return {"role": "assistant", "content": None, "tool_calls": list(calls)} | fields


def output(text, id=None):
    made = {"role": "tool", "content": text}
    return made if id is None else made | {"tool_call_id": id}


def test_calls_and_their_outputs_are_written_as_in_tuning():
    messages = [
        *HI,
        calling(call("find", "1", date="x"), reasoning_content="r", content="a"),
        output("[]", "1"),
        {"role": "assistant", "content": "b", "reasoning_content": "s\n\nt"},
        {"role": "user", "content": "c"},
    ]
    answer = {"role": "assistant", "content": "d", "reasoning_content": "u"}
    record = {"messages": [*messages, answer], "think": "free", "tools": [FIND]}
    learnt = b"".join(segment.text for segment in parse_record(record).segments)
    asked = prompt_of(messages=messages, think="free", tools=[FIND])
    assert learnt.decode().startswith(asked) and asked.endswith("Assistant: <think")
    assert asked.count("<think") == 3


def test_outputs_of_functions_are_in_the_order_of_their_calls():
    both = calling(call("find", "1"), call("find", "2"))
    ordered = [*HI, both, output("a", "1"), output("b", "2")]
    swapped = [*HI, both, output("b", "2"), output("a", "1")]
    unnamed = [*HI, both, output("a"), output("b")]
    rounds = [*ordered, calling(call("find", "3"), call("find", "1")), output("c", "1")]
    for messages in (swapped, unnamed):
        assert prompt_of(messages=messages) == prompt_of(messages=ordered)
    again = prompt_of(messages=[*rounds, output("d", "3")])
    outputs = again.split("Function output:\n")[1:]
    assert [text.partition("\n")[0] for text in outputs] == list("abdc")


MODES = "off, fast, free, short, medium, long"


@pytest.mark.parametrize(
    ("body", "param", "sentence"),
    [
        ({"think": "deep"}, "think", f"`think` must be one of {MODES}; got 'deep'."),
        ({"think": True}, "think", "`think` must be a string; got a boolean."),
        (
            {"reasoning_effort": "xhigh"},
            "reasoning_effort",
            "`reasoning_effort` must be one of none, minimal, low, medium, high; got 'xhigh'.",
        ),
        (
            {"reasoning_effort": 3},
            "reasoning_effort",
            "`reasoning_effort` must be a string; got a number.",
        ),
        (
            {"reasoning_effort": "high", "think": "off"},
            "think",
            "`think` must be 'long', the think mode of `reasoning_effort` 'high', or left out; "
            "got 'off'.",
        ),
        (
            {
                "chat_template_kwargs": {"enable_thinking": False},
                "reasoning_effort": "low",
            },
            "chat_template_kwargs",
            "`chat_template_kwargs.enable_thinking` must agree with the think mode of `think` or "
            "`reasoning_effort`, 'short'; got false.",
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": True}, "think": "off"},
            "chat_template_kwargs",
            "`reasoning_effort`, 'off'; got true.",
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": 1}},
            "chat_template_kwargs",
            "`chat_template_kwargs.enable_thinking` must have the name enable_thinking and the "
            "value true or false.",
        ),
        (
            {"chat_template_kwargs": {"thinking": True}},
            "chat_template_kwargs",
            "`chat_template_kwargs.thinking` must have the name enable_thinking and the value "
            "true or false.",
        ),
        (
            {"chat_template_kwargs": []},
            "chat_template_kwargs",
            "`chat_template_kwargs` must be an object; got a list.",
        ),
        ({"tools": {}}, "tools", "`tools` must be a list; got an object."),
        ({"tools": [3]}, "tools", '`tools`: a tool must be an object with a "name"'),
        ({"tools": [{}]}, "tools", '`tools`: a tool must be an object with a "name"'),
        (
            {"tools": [{"type": "function", "function": {"name": 3}}]},
            "tools",
            '`tools`: a tool must be an object with a "name"',
        ),
        (
            {"tools": [{"type": "web_search"}]},
            "tools",
            "`tools` must be of type 'function'; got 'web_search'.",
        ),
        (
            {"tools": [{"name": "f", "parameters": 3}]},
            "tools",
            '`tools`: the parameters of "f" must be an object.',
        ),
        (
            {"tools": [{"function": FIND["function"] | {"strict": True}}]},
            "tools",
            "`tools` must not be `strict`, because schemas are not enforced",
        ),
        ({"tools": [{"name": "\ud800"}]}, "tools", "`tools` has a lone surrogate."),
        (
            {"tools": [{"name": "f", "arguments": {"a": float("nan")}}]},
            "tools",
            "`tools`: ",
        ),
        (
            {"tools": [FIND], "tool_choice": "required"},
            "tool_choice",
            "`tool_choice` must be 'auto' or 'none', because a call cannot be enforced; "
            "got 'required'.",
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "find"}}},
            "tool_choice",
            "got an object.",
        ),
        (
            {"parallel_tool_calls": "no"},
            "parallel_tool_calls",
            "`parallel_tool_calls` must be true or false; got a string.",
        ),
        ({"functions": [{"name": "f"}]}, "functions", "`functions` is not supported"),
        (
            {"messages": [*HI, calling(call("f", "1")), output("a", "2")]},
            "messages",
            '`messages`: message 3: "tool_call_id" must be that of a call in the '
            "previous answer; got '2'.",
        ),
        (
            {"messages": [*HI, calling(call("f", "1")), *HI, output("a", "1")]},
            "messages",
            'message 4: "tool_call_id" must be',
        ),
        (
            {"messages": [*HI, output("a", ["1"])]},
            "messages",
            'message 2: "tool_call_id" must be',
        ),
        (
            {"messages": [*HI, calling({"type": "custom", "custom": {}})]},
            "messages",
            '`messages`: message 2: a call must be an object with a "name"',
        ),
        (
            {"messages": [HI[0] | {"tool_calls": 3}, output("a", "1")]},
            "messages",
            'message 2: "tool_call_id" must be',
        ),
        (
            {"messages": [*HI, calling(call("f"), content="<think", reasoning="r")]},
            "messages",
            'message 2: "reasoning", and an answer that begins with <think',
        ),
    ],
)
def test_an_invalid_field_is_rejected_by_name(body, param, sentence):
    with pytest.raises(Refused) as refused:
        chat_of(**body)
    error = refused.value
    assert sentence in error.message and error.message.endswith(".")
    assert (error.param, error.status) == (param, 400)
    assert len(error.message) < 300


@pytest.mark.parametrize("depth", [900, 2_000, 50_000])
def test_deeply_nested_values_are_rejected_or_written(depth):
    value = 1
    for _ in range(depth):
        value = {"a": value}
    messages = [*HI, calling({"name": "f", "arguments": value}), output("1")]
    bodies = {
        "tools": {"tools": [{"name": "f", "arguments": value}]},
        "messages": {"messages": messages},
    }
    for name, body in bodies.items():
        try:
            chat_of(**body)
        except Refused as error:
            assert error.message.startswith(f"`{name}`")
            assert error.message.endswith("is nested too deeply.")
