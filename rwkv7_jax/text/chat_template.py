"""RWKV-7's chat templates: how a conversation is written as one text.

    System: ...

    User: ...

    Assistant: ...

Turns end at a blank line. The tables and texts below are all that the templates are made of; tuning
data, `rwkv7 generate --chat` and the Jinja template of exported folders are written from them.

Source: BlinkDL/RWKV-LM@524481d RWKV-v7/RWKV7-G1x-templates.txt.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rwkv7_jax.json_files import parse_json

SPEAKERS = {
    "system": "System",
    "user": "User",
    "assistant": "Assistant",
    # What a function gave is told by the user.
    "tool": "User",
}

TURN_END = "\n\n"

# A system turn with functions that may be called, one on a line; an own text comes before.
TOOLS_BEGIN = "Tools:\n[\n"
TOOLS_BETWEEN = ",\n"
TOOLS_END = "\n]\nReturn only a JSON function call."

# An answer that calls a function, and what the function gave.
CALL_BEGIN = "```json"
CALL_END = "\n```"
OUTPUT_BEGIN = "Function output:\n"

# Thoughts come first in an answer.
THOUGHT_BEGIN = "<think"
THOUGHT_END = "\n</think>\n"


class ThinkMode(NamedTuple):
    """How long a model thinks before it answers.

    Attributes:
        suffix: ends the question.
        opening: begins the answer, after its speaker; the model goes on from there.
        filler: comes between the opening and an answer without thoughts; None where an answer must
            have thoughts.
    """

    suffix: str
    opening: str
    filler: str | None


THINK_MODES = {
    "off": ThinkMode("", "", ""),
    # The thoughts are empty: quick, and often as good.
    "fast": ThinkMode("", " <think>\n</think", ">\n"),
    "free": ThinkMode("", " <think", None),
    "short": ThinkMode(" (think a bit)", " <think", None),
    "medium": ThinkMode(" (think)", " <think", None),
    "long": ThinkMode(" (think a lot)", " <think", None),
}


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: one of `SPEAKERS`.
        content: its words.
        thought: of the assistant, before the words; None, or empty, where there is none.
        calls: of the assistant, after the words: function calls as JSON.
    """

    role: str
    content: str = ""
    thought: str | None = None
    calls: tuple[str, ...] = ()


class Part(NamedTuple):
    """A stretch of a conversation's text.

    Attributes:
        text: as the model reads it.
        is_answer: whether the model writes it; else it is only read.
    """

    text: str
    is_answer: bool


def turn_start(role: str) -> str:
    """Returns what a turn begins with; its words follow after a space."""
    return f"{SPEAKERS[role]}:"


# A model that has answered goes on with the user's next message: generation ends before it.
CHAT_STOP = TURN_END + turn_start("user")


def clean_message(text: str) -> str:
    """Removes what would end a turn from inside a message: blank lines, and blanks at its ends.

    Tuning data and the messages of a chat both go through here: a model must be asked in the form
    that it was trained on.
    """
    text = text.replace("\r\n", "\n")
    return re.sub(r"\s{2,}", _without_blank_lines, text).strip()


def _without_blank_lines(blanks: re.Match[str]) -> str:
    """Shortens a run of blanks to its last line break and what follows, if it has two."""
    # Not a pattern such as \s*\n\s*\n: it takes time with the square of a run.
    run = blanks[0]
    return run[run.rindex("\n") :] if run.count("\n") > 1 else run


def compact_json(value: Any) -> str:
    """Writes JSON on one line without blanks, as the templates have it.

    Raises:
        ValueError: it is nested too deeply, or has a number that JSON does not have, such as NaN;
            the message is the reason alone.
    """
    try:
        return json.dumps(
            value, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
    except RecursionError:
        raise ValueError("a call or a function is nested too deeply") from None


def _described(entry: Any) -> Mapping[str, Any] | None:
    """Returns what a tool or a call says of its function; None where that has no name."""
    if not isinstance(entry, Mapping):
        return None
    # OpenAI's interface has it under a name; a null says that it stands here.
    function = entry.get("function")
    function = entry if function is None else function
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    return function


def tool_text(tool: Any) -> str:
    """Writes a function that may be called, as JSON of its name, description and arguments.

    Args:
        tool: these three, or a function as OpenAI's interface describes it, whose `parameters` are
            a JSON schema.

    Raises:
        ValueError: a function without a name, or whose arguments are no object.
    """
    function = _described(tool)
    if function is None:
        raise ValueError(f'a tool must be an object with a "name"; got {tool!r:.80}')
    arguments = function.get("arguments")
    if arguments is None:
        schema = function.get("parameters") or {}
        if not isinstance(schema, Mapping):
            raise ValueError(
                f'the parameters of "{function["name"]}" must be an object'
            )
        arguments = schema.get("properties")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f'the arguments of "{function["name"]}" must be an object')
    fields = {"name": function["name"]}
    if function.get("description"):
        fields["description"] = function["description"]
    return compact_json({**fields, "arguments": arguments})


def call_text(call: Any) -> str:
    """Writes a call of a function as JSON of its name and arguments.

    Args:
        call: these two, or a call as OpenAI's interface has it. Arguments may be JSON already.

    Raises:
        ValueError: a call without a name, or whose arguments are no JSON.
    """
    function = _described(call)
    if function is None:
        raise ValueError(f'a call must be an object with a "name"; got {call!r:.80}')
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    if isinstance(arguments, str):
        try:
            # Written, too: Python reads numbers that JSON does not have, such as NaN.
            compact_json(parse_json(arguments))
        except ValueError:
            raise ValueError(
                f'the arguments of "{function["name"]}" must be JSON; got {arguments!r:.80}'
            ) from None
        # Between what JSON consists of there may be blank lines; inside of its strings there are
        # none.
        arguments = clean_message(arguments)
    else:
        arguments = compact_json(arguments)
    name = compact_json(function["name"])
    return f'{{"name":{name},"arguments":{arguments}}}'


def think_mode(name: Any) -> ThinkMode:
    """Returns the think mode of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in THINK_MODES:
        raise ValueError(
            f"a think mode must be one of {', '.join(THINK_MODES)}; got {name!r}"
        )
    return THINK_MODES[name]


def answer_opening(
    think: str, tools: Sequence[str] = (), answer: str | None = None
) -> str:
    """Returns the given beginning of an answer, after its speaker; the model goes on from there.

    Args:
        think: one of `THINK_MODES`.
        tools: functions one of which an answer that does not think must call.
        answer: a known answer, which may begin otherwise; None for one that is asked for.
    """
    opening = think_mode(think).opening
    if not opening and tools:
        opening = f" {CALL_BEGIN}"
    return opening if answer is None or answer.startswith(opening) else ""


def write_conversation(
    messages: Sequence[Message],
    *,
    think: str = "off",
    tools: Sequence[str] = (),
    must_call: bool = True,
    ask: bool = False,
) -> list[Part]:
    """Writes a conversation in RWKV-7's template.

    All that precedes an answer is one part, so that a prompt has the ids in tuning that it has in
    generation. The suffix of a think mode ends questions whose answer thinks.

    Args:
        messages: in their order.
        think: one of `THINK_MODES`.
        tools: functions that may be called, as `tool_text` writes them.
        must_call: whether an answer that does not think is given the beginning of a call; else
            the model chooses between words and a call.
        ask: ends with the beginning of a further answer, which the model goes on with.

    Raises:
        ValueError: an unknown think mode.
    """
    mode = think_mode(think)
    turns = _with_tools(messages, tools)
    called = tools if must_call else ()
    parts: list[Part] = []
    prompt = ""
    for index, message in enumerate(turns):
        if index:
            prompt += TURN_END
        prompt += turn_start(message.role)
        if message.role != "assistant":
            following = turns[index + 1] if index + 1 < len(turns) else None
            is_thought_about = ask if following is None else thinks(following)
            prompt += f" {_words(message)}"
            if message.role == "user" and is_thought_about:
                prompt += mode.suffix
            continue
        answer = _answer(message, mode)
        opening = answer_opening(think, called, answer)
        parts.append(Part(prompt + opening, False))
        parts.append(Part(answer.removeprefix(opening), True))
        prompt = ""
    if ask:
        prompt += TURN_END if turns else ""
        prompt += turn_start("assistant") + answer_opening(think, called)
    if prompt:
        parts.append(Part(prompt, False))
    return parts


def thinks(message: Message) -> bool:
    """Tells whether a message begins with thoughts."""
    return bool(message.thought) or message.content.startswith(THOUGHT_BEGIN)


def without_thoughts(prompt: str, completion: str) -> str:
    """Removes the thoughts from the answer to a prompt of the template.

    Args:
        prompt: which may end inside the thoughts, as `answer_opening` begins them.
        completion: of a model; "" is left of one that ends before its thoughts do, and all of the
            completion of a prompt that does not end with an answer's beginning.
    """
    _, speaker, opening = prompt.rpartition(turn_start("assistant"))
    answer = opening + completion
    if not speaker or not answer.lstrip().startswith(THOUGHT_BEGIN):
        return completion
    _, _, words = answer.partition(THOUGHT_END.strip())
    return words


def _with_tools(messages: Sequence[Message], tools: Sequence[str]) -> list[Message]:
    """Puts the functions into the first turn, which is the system's."""
    turns = list(messages)
    if not tools:
        return turns
    text = TOOLS_BEGIN + TOOLS_BETWEEN.join(tools) + TOOLS_END
    if turns and turns[0].role == "system":
        first = turns.pop(0)
        # An empty text before the functions leaves no empty line.
        text = f"{first.content}\n{text}".lstrip()
    return [Message("system", text), *turns]


def _words(message: Message) -> str:
    """Writes the text of a turn that the model reads."""
    return (OUTPUT_BEGIN if message.role == "tool" else "") + message.content


def _answer(message: Message, mode: ThinkMode) -> str:
    """Writes what the model says in a turn, from the space after its name."""
    answer = " "
    if message.thought:
        answer += f"{THOUGHT_BEGIN}>\n{message.thought}{THOUGHT_END}"
    elif mode.filler and not thinks(message):
        answer = mode.opening + mode.filler
    answer += message.content
    if message.calls:
        calls = message.calls[0]
        if len(message.calls) > 1:
            calls = f"[{','.join(message.calls)}]"
        answer += "\n" if message.content else ""
        answer += f"{CALL_BEGIN}\n{calls}{CALL_END}"
    # Without words after a thought there would be a blank line, which ends a turn.
    return answer.rstrip("\n")


def chat_prompt(
    message: bytes,
    *,
    system: bytes = b"",
    think: str = "off",
    tools: Sequence[str] = (),
    must_call: bool = True,
) -> bytes:
    """Returns the prompt that asks for an answer to one message.

    Args:
        message: bytes that need not be UTF-8; `clean_message` says what is removed.
        system: what the system says before; empty for nothing.
        think: one of `THINK_MODES`.
        tools: functions that may be called, as `tool_text` writes them.
        must_call: that of `write_conversation`.

    Raises:
        ValueError: an unknown think mode.
    """
    messages = []
    for role, text in (("system", system), ("user", message)):
        # Surrogates stand for bytes that are not UTF-8, and are no blanks.
        content = clean_message(text.decode("utf-8", "surrogateescape"))
        if content or role == "user":
            messages.append(Message(role, content))
    parts = write_conversation(
        messages, think=think, tools=tools, must_call=must_call, ask=True
    )
    return "".join([part.text for part in parts]).encode("utf-8", "surrogateescape")


def read_tools(text: str | bytes) -> tuple[str, ...]:
    """Reads a JSON list of functions, as templates write them.

    Raises:
        ValueError: no such list; the message is the reason alone.
    """
    try:
        tools = parse_json(text)
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None
    return tool_texts(tools)


def tool_texts(tools: Any) -> tuple[str, ...]:
    """Writes a list of functions that may be called; see `tool_text`.

    Raises:
        ValueError: no list, or something else in it; the message is the reason alone.
    """
    if not isinstance(tools, list):
        raise ValueError(f"must be a list of functions; got {type(tools).__name__}")
    return tuple(tool_text(tool) for tool in tools)
