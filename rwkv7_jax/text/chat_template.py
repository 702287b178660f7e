"""RWKV-7's chat template, which formats a conversation as one text.

    System: ...

    User: ...

    Assistant: ...

Turns end at a blank line. The constants below define the template. Tuning data,
`rwkv7 generate --chat` and the Jinja template of exported folders are all written from them.

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
    # The user turn also carries function outputs.
    "tool": "User",
}

TURN_END = "\n\n"

# The available functions in the system turn, one per line, after the system message.
TOOLS_BEGIN = "Tools:\n[\n"
TOOLS_BETWEEN = ",\n"
TOOLS_END = "\n]\nReturn only a JSON function call."

# A function call in an answer, and the output of the function.
CALL_BEGIN = "```json"
CALL_END = "\n```"
OUTPUT_BEGIN = "Function output:\n"

# Thoughts precede the words of an answer.
THOUGHT_BEGIN = "<think"
THOUGHT_END = "\n</think>\n"


class ThinkMode(NamedTuple):
    """How long a model thinks before it answers.

    Attributes:
        suffix: appended to the question.
        opening: given beginning of the answer, after its speaker; the model continues from there.
        filler: text between the opening and an answer without thoughts; None if an answer must
            have thoughts.
    """

    suffix: str
    opening: str
    filler: str | None


THINK_MODES = {
    "off": ThinkMode("", "", ""),
    # Empty thoughts: fast, and often as good.
    "fast": ThinkMode("", " <think>\n</think", ">\n"),
    "free": ThinkMode("", " <think", None),
    "short": ThinkMode(" (think a bit)", " <think", None),
    "medium": ThinkMode(" (think)", " <think", None),
    "long": ThinkMode(" (think a lot)", " <think", None),
}


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: a key of `SPEAKERS`.
        content: the words.
        thought: the assistant's thoughts, before the words; None or empty if there are none.
        calls: the assistant's function calls as JSON, after the words.
    """

    role: str
    content: str = ""
    thought: str | None = None
    calls: tuple[str, ...] = ()


class Part(NamedTuple):
    """A part of a conversation's text.

    Attributes:
        text: the text of the part.
        is_answer: whether the model writes it (a target) or only reads it.
    """

    text: str
    is_answer: bool


def turn_start(role: str) -> str:
    """Returns the beginning of a turn; its words follow after a space.

    Raises:
        ValueError: the role is unknown.
    """
    if role not in SPEAKERS:
        raise ValueError(f"a role must be one of {', '.join(SPEAKERS)}; got {role!r}")
    return f"{SPEAKERS[role]}:"


# After its answer a model would continue with the next user turn, so generation stops here.
CHAT_STOP = TURN_END + turn_start("user")


def clean_message(text: str) -> str:
    """Removes blank lines, which would end a turn, and surrounding whitespace from a message.

    Tuning data and chat messages both pass through here, so that a model is prompted in the form
    that it was trained on.
    """
    text = text.replace("\r\n", "\n")
    return re.sub(r"\s{2,}", _without_blank_lines, text).strip()


def _without_blank_lines(blanks: re.Match[str]) -> str:
    """Shortens whitespace with two line breaks to the last one and what follows it."""
    # A pattern such as \s*\n\s*\n would take quadratic time in the length of the run.
    run = blanks[0]
    return run[run.rindex("\n") :] if run.count("\n") > 1 else run


def compact_json(value: Any) -> str:
    """Writes JSON on one line without spaces, as in the template.

    Raises:
        ValueError: the value is nested too deeply, or has a number such as NaN that JSON lacks; the
            message is only the reason.
    """
    try:
        return json.dumps(
            value, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
    except RecursionError:
        raise ValueError("a call or a function is nested too deeply") from None


def _described(entry: Any) -> Mapping[str, Any] | None:
    """Returns the function of a tool or a call as an object; None if it has no name."""
    if not isinstance(entry, Mapping):
        return None
    # OpenAI's API nests it under "function"; otherwise, or if that is null, it is the entry itself.
    function = entry.get("function")
    function = entry if function is None else function
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    return function


def tool_text(tool: Any) -> str:
    """Writes an available function as JSON with its name, description and arguments.

    Args:
        tool: an object with these three, or a function in OpenAI's format, whose `parameters` are a
            JSON schema.

    Raises:
        ValueError: the function has no name, or its arguments are not an object.
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
    """Writes a function call as JSON with its name and arguments.

    Args:
        call: an object with these two, or a call in OpenAI's format. Arguments may be JSON text.

    Raises:
        ValueError: the call has no name, or its arguments are not JSON.
    """
    function = _described(call)
    if function is None:
        raise ValueError(f'a call must be an object with a "name"; got {call!r:.80}')
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    if isinstance(arguments, str):
        try:
            # `compact_json` rejects numbers such as NaN, which Python's parser accepts.
            compact_json(parse_json(arguments))
        except ValueError:
            raise ValueError(
                f'the arguments of "{function["name"]}" must be JSON; got {arguments!r:.80}'
            ) from None
        # Blank lines may only occur between JSON tokens, never inside strings.
        arguments = clean_message(arguments)
    else:
        arguments = compact_json(arguments)
    name = compact_json(function["name"])
    return f'{{"name":{name},"arguments":{arguments}}}'


def think_mode(name: Any) -> ThinkMode:
    """Returns the think mode with that name.

    Raises:
        ValueError: the name is unknown.
    """
    if not isinstance(name, str) or name not in THINK_MODES:
        raise ValueError(
            f"a think mode must be one of {', '.join(THINK_MODES)}; got {name!r}"
        )
    return THINK_MODES[name]


def answer_opening(
    think: str, tools: Sequence[str] = (), answer: str | None = None
) -> str:
    """Returns the given beginning of an answer, after its speaker; the model continues from there.

    Args:
        think: a key of `THINK_MODES`.
        tools: functions, one of which an answer without thoughts must call.
        answer: a known answer, which may begin differently; None to ask for one.
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

    Everything before an answer is one part, so that a prompt has the same token ids in tuning and
    in generation. The think mode's suffix is appended only to questions whose answer has thoughts.

    Args:
        messages: the messages in order.
        think: a key of `THINK_MODES`.
        tools: the available functions, as `tool_text` writes them.
        must_call: whether an answer without thoughts is given the beginning of a call; if not, the
            model chooses between words and a call.
        ask: whether to end with the beginning of another answer, for the model to continue.

    Raises:
        ValueError: the think mode or a role is unknown.
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
    """Returns whether a message begins with thoughts."""
    return bool(message.thought) or message.content.startswith(THOUGHT_BEGIN)


def without_thoughts(prompt: str, completion: str) -> str:
    """Removes the thoughts from the answer to a prompt in the template.

    Returns "" if the thoughts do not end, and the whole completion if the prompt does not end with
    the beginning of an answer.

    Args:
        prompt: the prompt, which may end inside the thoughts, as `answer_opening` begins them.
        completion: the model's completion.
    """
    _, speaker, opening = prompt.rpartition(turn_start("assistant"))
    answer = opening + completion
    # Another turn, or an example of another form, may follow the last answer of a prompt.
    is_answer = speaker and TURN_END not in opening
    if not is_answer or not answer.lstrip().startswith(THOUGHT_BEGIN):
        return completion
    _, _, words = answer.partition(THOUGHT_END.strip())
    return words


def _with_tools(messages: Sequence[Message], tools: Sequence[str]) -> list[Message]:
    """Adds the functions to the system turn, which comes first."""
    turns = list(messages)
    if not tools:
        return turns
    text = TOOLS_BEGIN + TOOLS_BETWEEN.join(tools) + TOOLS_END
    if turns and turns[0].role == "system":
        first = turns.pop(0)
        # An empty system message leaves no empty line before the functions.
        text = f"{first.content}\n{text}".lstrip()
    return [Message("system", text), *turns]


def _words(message: Message) -> str:
    """Writes the text of a turn that the model only reads."""
    return (OUTPUT_BEGIN if message.role == "tool" else "") + message.content


def _answer(message: Message, mode: ThinkMode) -> str:
    """Writes the text of an assistant turn, from the space after the colon."""
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
    # A thought without words would leave a blank line, which ends a turn.
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
        message: the user message, cleaned by `clean_message`; need not be UTF-8.
        system: the system message; empty for none.
        think: a key of `THINK_MODES`.
        tools: the available functions, as `tool_text` writes them.
        must_call: as in `write_conversation`.

    Raises:
        ValueError: the think mode is unknown.
    """
    messages = []
    for role, text in (("system", system), ("user", message)):
        # Surrogates stand for bytes that are not UTF-8; they are not whitespace.
        content = clean_message(text.decode("utf-8", "surrogateescape"))
        if content or role == "user":
            messages.append(Message(role, content))
    parts = write_conversation(
        messages, think=think, tools=tools, must_call=must_call, ask=True
    )
    return "".join([part.text for part in parts]).encode("utf-8", "surrogateescape")


def read_tools(text: str | bytes) -> tuple[str, ...]:
    """Reads a JSON list of functions and writes each as the template does.

    Raises:
        ValueError: it is not such a list; the message is only the reason.
    """
    try:
        tools = parse_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    return tool_texts(tools)


def tool_texts(tools: Any) -> tuple[str, ...]:
    """Writes a list of available functions; see `tool_text`.

    Raises:
        ValueError: it is not a list of functions; the message is only the reason.
    """
    if not isinstance(tools, list):
        raise ValueError(f"must be a list of functions; got {type(tools).__name__}")
    return tuple(tool_text(tool) for tool in tools)
