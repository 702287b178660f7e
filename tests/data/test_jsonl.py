"""JSON lines as documents: the World template and the loss mask."""

import json
import re

import pytest
from marked_records import marked

from rwkv7_jax.data.jsonl import (
    ReadStats,
    check_object,
    read_jsonl,
    read_log,
)
from rwkv7_jax.data.records.record import parse_record
from rwkv7_jax.text.tokenizer import Tokenizer


def say(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_a_text_is_fully_in_the_loss_but_a_question_only_by_its_answer():
    assert marked({"text": "a b", "source": 7}) == "a b"
    assert marked({"prompt": "2+2=", "answer": "4"}) == "[2+2=]4"
    assert marked({"prompt": "", "answer": "4"}) == "[]4"


def test_only_assistant_turns_of_a_templated_chat_are_in_the_loss():
    record = say(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."))
    record["messages"] += say(("user", "Bye"), ("assistant", "Bye!"))["messages"]
    assert marked(record) == (
        "[System: Be brief.\n\nUser: Hi\n\nAssistant:] Hello.[\n\nUser: Bye\n\nAssistant:] Bye!"
    )


@pytest.mark.parametrize("blank", ["\n\n", "\r\n\r\n", "\n \n", "\n\n\t\n", "  \n\n"])
def test_blank_lines_inside_a_turn_are_removed(blank):
    record = say(("user", f"\n a{blank}b\n"), ("assistant", f"c{blank}  d{blank}"))
    assert marked(record) == "[User: a\nb\n\nAssistant:] c\n  d"


@pytest.mark.parametrize(
    "tokenizer", [Tokenizer.bytes(), Tokenizer.world()], ids=lambda t: t.name
)
def test_prompt_ids_do_not_depend_on_the_answer(tokenizer):
    prompt = "User: Hi\n\nAssistant:"
    for record in (
        say(("user", "Hi"), ("assistant", "Ho")),
        {"prompt": prompt, "answer": " Ho"},
    ):
        pieces = [
            (ids.tolist(), in_loss)
            for ids, in_loss in parse_record(record).ids(tokenizer)
        ]
        answer = tokenizer.encode(" Ho")
        assert pieces == [
            (tokenizer.encode(prompt), False),
            (answer, True),
            ([0], True),
        ]


def test_invalid_log_lines_can_be_skipped(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_log(path) == []
    path.write_text(
        '{"step": 1}\n\n[2]\n{"step": 3, "text": "a\u2028b"}\n{"step": 4, "lo'
    )
    assert read_log(path) == [{"step": 1}, {"step": 3, "text": "a\u2028b"}]


def test_non_finite_numbers_are_valid_in_logs_but_not_in_data(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"loss": float("inf")}))
    assert read_log(path) == [{"loss": float("inf")}]
    with pytest.raises(
        ValueError, match=r"log\.jsonl:1: Infinity is not a JSON number"
    ):
        list(read_jsonl(path, check_object))


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"text": "a", "text": "b"}', "text"),
        ('{"messages": [{"role": "user", "content": "a", "role": "tool"}]}', "role"),
    ],
)
def test_a_repeated_key_is_rejected(tmp_path, line, key):
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(ValueError, match=f'x.jsonl:1: "{key}" twice in one object'):
        list(read_jsonl(tmp_path / "x.jsonl", check_object))


def test_only_an_incomplete_last_line_is_dropped(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a"')
    with pytest.warns(UserWarning, match=r"x\.jsonl:2: dropped; the line breaks off"):
        assert list(read_jsonl(path, check_object, drop_torn_end=True)) == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: not one JSON object"):
        list(read_jsonl(path, check_object, drop_torn_end=True))


def test_skipped_lines_are_counted_and_the_first_error_is_kept(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('[1]\n{"a": 1}\noops\n')
    stats = ReadStats()
    assert list(read_jsonl(path, check_object, on_bad="skip", stats=stats)) == [
        {"a": 1}
    ]
    assert stats.skipped == 2
    assert stats.first_error == f"{path}:1: must be an object; got list"
    assert stats.bytes == path.stat().st_size


MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Add.\n\n\n2 and 2"},
        {"role": "assistant", "content": "4"},
    ]
}


@pytest.mark.parametrize(
    "record",
    [
        {
            "instruction": "Add.",
            "input": "2 and 2",
            "output": "4",
            "system": "Be kind.",
        },
        {
            "instruction": "Add.\n\n2 and 2",
            "input": "",
            "output": "4",
            "system": "Be kind.",
        },
        {
            "instruction": "Add.\n2 and 2",
            "output": "4",
            "system": "Be kind.",
            "history": [],
        },
        {
            "instruction": "Add.",
            "context": "2 and 2",
            "response": "4",
            "category": "closed_qa",
            "system": "Be kind.",
        },
        {
            "instruction": "Add.",
            "input": "",
            "context": "2 and 2",
            "system": "",
            "system_prompt": "Be kind.",
            "output": "4",
            "response": "of another model",
        },
        {
            "id": "niv.1",
            "system_prompt": "Be kind.",
            "question": "Add.\n2 and 2",
            "response": "4",
        },
        {
            "system": "Be kind.",
            "query": "Add.\n2 and 2",
            "response": "4",
            "type": "GSM_Rephrased",
        },
        {"system": "Be kind.", "question": "Add.\n2 and 2", "answer": "4"},
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Add.\n"},
                        {"type": "text", "text": "2 and 2"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "4"}]},
            ]
        },
        {
            "system": "Be kind.",
            "conversations": [
                {"from": "human", "value": "Add.\r\n\r\n2 and 2"},
                {"from": "gpt", "value": "4"},
            ],
        },
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "User", "value": "Add.\n2 and 2"},
                {"from": "Assistant", "value": "4"},
            ],
        },
        {"system": "Be kind.", "conversation": MESSAGES["messages"][1:]},
        {"prompt": "Add.\n\n\n2 and 2", "prompt_id": "f0e3", **MESSAGES},
        {
            "prompt": MESSAGES["messages"][:2],
            "completion": MESSAGES["messages"][2:],
        },
        {
            "messages": [
                {"role": "developer", "content": "Be kind."},
                *MESSAGES["messages"][1:],
            ]
        },
        {"prompt": "Add.\n\n\n2 and 2", "chosen": [], "rejected": [], **MESSAGES},
    ],
)
def test_foreign_chat_formats_equal_messages(record):
    assert marked(record) == marked(MESSAGES)


@pytest.mark.parametrize(
    "record",
    [
        {"text": None, "label": None, **MESSAGES},
        {"prompt": None, "completion": None, "chosen": None, **MESSAGES},
        {"data": None, "conversations": MESSAGES["messages"], "messages": None},
        {
            "system": "Be kind.",
            "question": "Add.\n2 and 2",
            "query": None,
            "answer": "4",
            "output": None,
            "history": None,
        },
        {
            "conversations": [
                {
                    "from": message["role"],
                    "value": message["content"],
                    "role": None,
                    "content": None,
                    "tool_calls": None,
                    "weight": None,
                }
                for message in MESSAGES["messages"]
            ]
        },
    ],
)
def test_a_null_value_counts_as_an_absent_key(record):
    assert marked(record) == marked(MESSAGES)


def test_the_history_of_an_alpaca_record_comes_first():
    record = {
        "instruction": "And 3?",
        "input": None,
        "output": "5",
        "history": [["2+2?", "4"]],
    }
    assert (
        marked(record)
        == "[User: 2+2?\n\nAssistant:] 4[\n\nUser: And 3?\n\nAssistant:] 5"
    )


def test_bare_strings_alternate_between_user_and_assistant():
    for name in ("data", "conversations"):
        record = {"id": "0", name: ["Hi", "Hello.", "Bye", "Bye!"]}
        assert marked(record) == (
            "[User: Hi\n\nAssistant:] Hello.[\n\nUser: Bye\n\nAssistant:] Bye!"
        )


@pytest.mark.parametrize("name", ["weight", "train", "loss"])
@pytest.mark.parametrize("last", [False, True])
def test_an_answer_with_weight_0_is_not_in_the_loss(name, last):
    """The end of text after such an answer is not in the loss either."""
    record = say(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    record["messages"][3 if last else 1][name] = 0
    record["messages"][1 if last else 3][name] = True
    record["messages"][0][name] = None
    first, second = (" b", "[ d]") if last else ("[ b]", " d")
    assert marked(record) == (
        f"[User: a\n\nAssistant:]{first}[\n\nUser: c\n\nAssistant:]{second}"
    )
    *_, (end, in_loss) = parse_record(record).ids(Tokenizer.bytes())
    assert end.tolist() == [0] and in_loss is not last


def test_only_the_completion_of_a_chat_is_in_the_loss():
    turns = say(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))[
        "messages"
    ]
    assert marked({"prompt": turns[:3], "completion": turns[3:]}) == (
        "[User: a\n\nAssistant:][ b][\n\nUser: c\n\nAssistant:] d"
    )


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_in_the_loss_under_every_name(name):
    record = say(("user", "a"), ("assistant", "b"))
    record["messages"][1][name] = "hm"
    record["messages"][1]["tool_calls"] = None
    assert marked(record) == "[User: a\n\nAssistant:] <think>\nhm\n</think>\nb"


def test_old_and_new_call_formats_are_equivalent():
    function = {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}
    call = {"name": "f", "arguments": '{"x":1}'}
    old = say(("user", "a"), ("assistant", None), ("function", "2"), ("assistant", "b"))
    new = say(("user", "a"), ("assistant", None), ("tool", "2"), ("assistant", "b"))
    old["messages"][1]["function_call"] = call
    new["messages"][1]["tool_calls"] = [{"type": "function", "function": call}]
    new["tools"] = [{"type": "function", "function": function}]
    assert marked(old | {"functions": [function]}) == marked(new)


def test_a_completion_is_the_answer_to_its_prompt():
    assert marked({"prompt": "2+2=", "completion": "4"}) == "[2+2=]4"


def test_text_takes_precedence_over_an_instruction():
    record = {"instruction": "a", "output": "b", "text": "all of it"}
    assert marked(record) == "all of it"


ANSWERED = (
    {"prompt": "a", "completion": "b"},
    {"prompt": "a", "answer": "b"},
    {"prompt": MESSAGES["messages"][:2], "completion": MESSAGES["messages"][2:]},
    {"instruction": "a", "output": "b"},
    {"question": "a", "answer": "b"},
    {"query": "a", "response": "b"},
    {"conversations": ["a", "b"]},
    {"data": ["a", "b"]},
    MESSAGES,
)


@pytest.mark.parametrize("record", ANSWERED)
@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_undesired_answers_are_rejected_in_every_format(record, name):
    for value in (False, 0, 0.0, "False", "false", "FALSE", " 0"):
        with pytest.raises(
            ValueError, match=f'"{name}" is .*, which marks an undesired'
        ):
            parse_record({**record, name: value})
    for value in (True, 1, "True", "1", None, "", "positive", 3, [0]):
        assert marked({**record, name: value}) == marked(record)


def test_a_label_next_to_a_text_is_ignored():
    assert marked({"text": "a", "label": 0}) == "a"
    with pytest.raises(ValueError, match=r'its keys are "sentence", "label"'):
        parse_record({"sentence": "a", "label": 0})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"question": "a", "query": "b", "answer": "c"},
            '"question" and "query" in one object',
        ),
        (
            {"question": "a", "answer": "b", "response": "c"},
            '"response" and "answer" in one object',
        ),
        (
            {"instruction": "a", "question": "b", "answer": "c"},
            '"instruction" and "question" in one object',
        ),
        (
            {"instruction": "a", "input": "b", "context": "c", "output": "d"},
            '"input" and "context" in one object',
        ),
        ({"question": "a", "choices": [], "answer": 2}, '"answer" must be a string'),
        ({}, "it has no keys"),
        ({"text": None, "id": 1}, 'its keys are "text" (null), "id"'),
        ({"prompt": "a", "answer": None}, 'no "answer" or "completion"'),
        ({str(i): i for i in range(20)}, '"7", ...'),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            'holds a preference pair ("chosen" and "rejected")',
        ),
        (
            {"chosen": MESSAGES["messages"], "rejected": MESSAGES["messages"]},
            'to learn the chosen answer, name it "completion" after a "prompt", or "messages"',
        ),
        ({"prompt": "b", **MESSAGES}, '"prompt" and "messages" in one object'),
        (
            {"conversations": ["a", "b", "c"]},
            "do not end with an answer of the assistant",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "weight": 0.5},
                ]
            },
            'message 2: "weight" must be 0 or 1; got 0.5',
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "train": False},
                ]
            },
            'no answer of "messages" is in the loss',
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": "a",
                        "thinking": "b",
                        "reasoning": "c",
                    }
                ]
            },
            'message 1: "reasoning" and "thinking" in one object',
        ),
        ({"prompt": "a", "completion": ""}, '"completion" is empty'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            'message 1: "content" must hold parts of type "text"; got \'image_url\'',
        ),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            'message 1: "content" must hold parts of type "text"; got \'a\'',
        ),
        ({"instruction": "a", "output": ""}, "an empty answer"),
        ({"instruction": 1, "output": "a"}, '"instruction" must be a string; got int'),
        (
            {"instruction": "a", "output": "b", "history": "x"},
            '"history" must be a list of pairs',
        ),
        (
            {"instruction": "a", "output": "b", "history": [["x"]]},
            '"history" must be a list',
        ),
        ({"conversations": "x"}, '"conversations" must be a list of messages'),
        (
            {"conversations": [{"from": "human", "value": "a"}]},
            '"conversations" do not end with',
        ),
        (
            {"conversations": [{"from": "judge", "value": "a"}]},
            "message 1: role must be system, user, assistant, tool; got 'judge', and its keys are "
            '"from", "value"',
        ),
        ({"conversations": [{"from": "gpt"}]}, 'message 1: no "value"'),
    ],
)
def test_an_unknown_record_is_rejected_with_its_keys(record, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_record(record)
