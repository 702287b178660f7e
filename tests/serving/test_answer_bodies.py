"""Messages as clients get them, whole or assembled from a stream with any cuts."""

import pytest
from served_bytes import BYTES, SERVED

from rwkv7_jax.serving.answer_bodies import AnswerBodies
from rwkv7_jax.serving.protocol import read_call
from rwkv7_jax.serving.requests import Answer, Piece, TokenScore

TOOLS = [
    {"type": "function", "function": {"name": "find", "parameters": None}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = '```json\n{"name":"find","arguments":{"date":"\u00e9"}}\n```'
TWO = '```json\n[{"name":"now"},\n {"name":"now","arguments":{}}]\n```'
FOUND = ("find", '{"date":"\u00e9"}')
NOW = ("now", "{}")


def bodies_of(**fields):
    messages = [{"role": "user", "content": "hi"}]
    call = read_call({"messages": messages} | fields, SERVED, is_chat=True)
    return AnswerBodies(call, BYTES)


def answer_of(text, ended="stop_id", scores=()):
    return Answer(text, (1, 2), ended, prompt_tokens=3, scores=scores)


def without_ids(message):
    """Separates a message from its calls (names and arguments), whose ids must be unique."""
    calls = message.pop("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(call["type"] == "function" for call in calls)
    functions = [call["function"] for call in calls]
    return message, [(one["name"], one["arguments"]) for one in functions]


def whole_of(text, ended="stop_id", **fields):
    (choice,) = bodies_of(**fields).whole([answer_of(text, ended)])["choices"]
    return *without_ids(choice["message"]), choice["finish_reason"]


def gathered(events):
    """Assembles a stream as clients do: texts are appended, calls have an index."""
    message = {"role": None, "content": ""}
    calls = []
    reason = None
    for event in events:
        (choice,) = event["choices"]
        delta = dict(choice["delta"])
        message["role"] = delta.pop("role", message["role"])
        for call in delta.pop("tool_calls", []):
            assert call.pop("index") == len(calls)
            calls.append(call)
        for name, text in delta.items():
            # The thought comes first.
            assert name == "content" or not (message["content"] or calls)
            message[name] = message.get(name, "") + text
        assert reason is None
        reason = choice["finish_reason"]
    if calls:
        message["content"] = message["content"] or None
        message["tool_calls"] = calls
    return *without_ids(message), reason


def streamed(texts, ended, **fields):
    bodies = bodies_of(**fields)
    events = bodies.openings()
    for text in texts:
        events += bodies.piece(0, Piece(text))
    return gathered([*events, *bodies.end(0, answer_of("".join(texts), ended))])


MESSAGES = [
    # The request, the model's text and how it ended; thought, words, calls and the reason.
    ({}, "a", "stop_id", None, "a", [], "stop"),
    ({}, " a \n", "stop_string", None, "a \n", [], "stop"),
    ({}, "", "length", None, "", [], "length"),
    ({}, " <think>\nx\n</think>\na", "stop_id", "x", "a", [], "stop"),
    ({"think": "free"}, ">\nx\n</think>\na", "stop_id", "x", "a", [], "stop"),
    ({"think": "long"}, ">\nx y\n", "length", "x y", "", [], "length"),
    ({"think": "free"}, ">\nx </thi", "length", "x", "", [], "length"),
    ({"think": "free"}, ">\nx", "stop_string", "x", "", [], "stop"),
    ({"think": "free"}, "", "length", None, "", [], "length"),
    ({"think": "free"}, ">\n</think>\na", "stop_id", None, "a", [], "stop"),
    ({"think": "fast"}, ">\na", "stop_id", None, "a", [], "stop"),
    ({"think": "fast"}, "", "length", None, "", [], "length"),
    ({"tools": TOOLS}, " a\n", "stop_id", None, "a\n", [], "stop"),
    ({"tools": TOOLS}, f" {CALL}", "stop_id", None, None, [FOUND], "tool_calls"),
    (
        {"tools": TOOLS},
        f" a\n{CALL}\n",
        "stop_string",
        None,
        "a",
        [FOUND],
        "tool_calls",
    ),
    (
        {"tools": TOOLS, "think": "short"},
        f">\nx\n</think>\n{CALL}\n{TWO}",
        "stop_id",
        "x",
        None,
        [FOUND, NOW, NOW],
        "tool_calls",
    ),
    (
        {"tools": TOOLS, "parallel_tool_calls": False},
        f" {TWO}",
        "stop_id",
        None,
        TWO,
        [],
        "stop",
    ),
    # What was cut may have been more.
    ({"tools": TOOLS}, f" {CALL}\n", "length", None, None, [FOUND], "length"),
    ({"tools": TOOLS}, f" {CALL[:-6]}", "length", None, CALL[:-6], [], "length"),
    ({"tools": TOOLS, "tool_choice": "none"}, CALL, "stop_id", None, CALL, [], "stop"),
    ({}, CALL, "stop_id", None, CALL, [], "stop"),
    (
        {"tools": TOOLS},
        " ```json\n{}\n```\n",
        "stop_id",
        None,
        "```json\n{}\n```\n",
        [],
        "stop",
    ),
]


@pytest.mark.parametrize(
    ("fields", "text", "ended", "thought", "words", "calls", "reason"), MESSAGES
)
def test_a_message_is_the_same_whole_or_streamed_with_any_cuts(
    fields, text, ended, thought, words, calls, reason
):
    message = {"role": "assistant", "content": words}
    if thought is not None:
        message["reasoning_content"] = thought
    assert whole_of(text, ended, **fields) == (message, calls, reason)
    assert streamed(list(text), ended, **fields) == (message, calls, reason)
    for cut in range(len(text) + 1):
        texts = [text[:cut], text[cut:]]
        assert streamed(texts, ended, **fields) == (message, calls, reason)


def test_answers_of_one_call_do_not_mix():
    texts = [">x</think>a", f">y</think>{CALL}", ">z"]
    fields = {"n": 3, "think": "free", "tools": TOOLS}
    bodies = bodies_of(**fields)
    events = bodies.openings()
    for at in range(max(map(len, texts))):
        for index, text in enumerate(texts):
            events += bodies.piece(index, Piece(text[at : at + 1]))
    answers = [answer_of(text) for text in texts]
    for index, answer in enumerate(answers):
        events += bodies.end(index, answer)
    choices = bodies.whole(answers)["choices"]
    for index, choice in enumerate(choices):
        own = [e for e in events if e["choices"][0]["index"] == index]
        message, calls = without_ids(choice["message"])
        assert gathered(own) == (message, calls, choice["finish_reason"])
    assert [choice["index"] for choice in choices] == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"think": "free"}, ">x</think>\n\na"), ({"tools": TOOLS}, f" a\n{CALL}\n")],
)
def test_scores_cover_all_tokens_in_order(fields, text):
    ids = BYTES.encode(text)
    scores = tuple(TokenScore(id, -float(at), ()) for at, id in enumerate(ids))
    bodies = bodies_of(logprobs=True, **fields)
    (choice,) = bodies.whole([answer_of(text, scores=scores)])["choices"]
    found = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert found == [-float(at) for at in range(len(ids))]
    events = []
    # An incomplete character has a score and no text.
    data = text.encode()
    for at, score in enumerate(scores):
        character = data[: at + 1].decode(errors="ignore")
        before = data[:at].decode(errors="ignore")
        events += bodies.piece(0, Piece(character.removeprefix(before), (score,)))
    events += bodies.end(0, answer_of(text))
    scored = [event["choices"][0]["logprobs"] for event in events]
    streamed = [entry for one in scored if one for entry in one["content"]]
    assert streamed == choice["logprobs"]["content"]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_each_token_of_a_completion_has_its_offset_in_the_text(size):
    text = "a\u00e9\u4e16\U0001f30d b"
    ids = BYTES.encode(text)
    scores = tuple(TokenScore(id, -1.0, ()) for id in ids)
    call = read_call({"prompt": "hi", "logprobs": 0, "n": 2}, SERVED, is_chat=False)
    # A byte that is not the first one of its character has the offset of that character.
    expected = []
    for offset, character in enumerate(text):
        expected += [offset] * len(character.encode())
    bodies = AnswerBodies(call, BYTES)
    streamed = ([], [])
    for first in range(0, len(scores), size):
        for index, found in enumerate(streamed):
            piece = Piece("", scores[first : first + size])
            (event,) = bodies.piece(index, piece)
            found += event["choices"][0]["logprobs"]["text_offset"]
    assert streamed == (expected, expected)
    answers = [answer_of(text, scores=scores)] * 2
    for choice in bodies.whole(answers)["choices"]:
        assert choice["logprobs"]["text_offset"] == expected


def test_the_messages_of_an_answer_can_be_sent_back():
    for fields, text, ended, *_ in MESSAGES:
        (choice,) = bodies_of(**fields).whole([answer_of(text, ended)])["choices"]
        said = choice["message"]
        outputs = []
        for call in said.get("tool_calls", []):
            output = {"role": "tool", "tool_call_id": call["id"], "content": "1"}
            outputs.append(output)
        question = {"role": "user", "content": "q"}
        messages = [question, said, *outputs, question]
        read_call({"messages": messages}, SERVED, is_chat=True)


def test_a_message_sent_back_has_the_ids_that_the_model_wrote():
    """Otherwise the prefix cache would miss a conversation whose message is sent back."""
    text = f">\nx\n</think>\na\n{CALL}"
    fields = {"think": "free", "tools": TOOLS}
    question = {"role": "user", "content": "q"}
    bodies = bodies_of(**fields, messages=[question])
    said = bodies.whole([answer_of(text)])["choices"][0]["message"]
    prompts = []
    for messages in ([question], [question, said, question]):
        body = {"messages": messages} | fields
        (request,) = read_call(body, SERVED, is_chat=True).requests
        prompts.append(BYTES.decode(list(request.prompt)))
    assert prompts[1].startswith(prompts[0] + text + "\n\n")
