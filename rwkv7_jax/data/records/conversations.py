"""Conversations of data sets as documents, in the template of `text.chat_template`.

A blank line ends a turn, so blank lines inside a turn are removed. The loss covers the assistant's
words, from the space after its name, and the end of text after the last answer. An answer with a
weight of 0 is only read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rwkv7_jax.data.documents import Document, Segment
from rwkv7_jax.data.records.fields import (
    keys_of,
    only_name,
    text_field,
    without_nulls,
)
from rwkv7_jax.text.chat_template import (
    SPEAKERS,
    THOUGHT_BEGIN,
    Message,
    ThinkMode,
    call_text,
    clean_message,
    think_mode,
    thinks,
    write_conversation,
)

# Role names of other tools, in lower case.
_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}

# Keys of an assistant's thoughts in DeepSeek, OpenRouter and gpt-oss.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")

# Values of these keys that only switch thinking on or off, as in Nemotron's data sets.
_SWITCHES = ("on", "off", "true", "false")

# Keys of an answer's loss weight in OpenAI and ShareGPT, axolotl, and ms-swift.
WEIGHTS = ("weight", "train", "loss")


def is_conversation(value: Any) -> bool:
    """Returns whether a value is a list of messages, each with a role and words or calls."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, Mapping) and _is_message(item) for item in value)


def _is_message(value: Mapping[str, Any]) -> bool:
    """Returns whether an object has the keys of a message."""
    if "from" in value and "value" in value:
        return True
    said = ("content", "tool_calls", "function_call")
    return "role" in value and any(name in value for name in said)


def conversation(
    messages: Any,
    name: str = "messages",
    *,
    think: Any = "off",
    tools: Sequence[str] = (),
    learn_from: int = 0,
) -> Document:
    """Formats chat messages in RWKV-7's template; only the assistant's answers are in the loss.

    Args:
        messages: objects with "role" and "content", or with ShareGPT's "from" and "value".
        name: name of the list, for error messages.
        think: a key of `chat_template.THINK_MODES`.
        tools: the available functions, as `chat_template.tool_text` writes them.
        learn_from: index of the first message in the loss; earlier answers are only read.

    Raises:
        ValueError: the value is not a list of messages with known roles, it does not end with an
            answer, an answer lacks thoughts that the think mode requires, or no answer is in the
            loss.
    """
    _check_messages(messages, name)
    must_think = _mode(think).filler is None
    turns = []
    learnt = []
    for number, message in enumerate(messages, 1):
        turn = read_message(message, number)
        turns.append(turn)
        if turn.role != "assistant":
            continue
        if not (turn.content or turn.calls):
            raise ValueError(f"message {number}: an empty answer")
        if must_think and not thinks(turn):
            raise ValueError(
                f'message {number}: must have a "reasoning_content", or begin with <think, '
                f'under "think" {think!r}'
            )
        learnt.append(_is_learnt(message, number) and number > learn_from)
    if turns[-1].role != "assistant":
        raise ValueError(f'"{name}" do not end with an answer of the assistant')
    if not any(learnt):
        raise ValueError(
            f'no answer of "{name}" is in the loss: all have a weight of 0'
        )
    flags = iter(learnt)
    segments = []
    # `must_call` is false, so the model writes the beginning of a call, and it is in the loss.
    for part in write_conversation(turns, think=think, tools=tools, must_call=False):
        in_loss = part.is_answer and next(flags)
        segments.append(Segment(part.text.encode(), in_loss=in_loss))
    return Document(tuple(segments))


def asked_conversation(
    messages: Any,
    name: str = "messages",
    *,
    think: Any = "off",
    tools: Sequence[str] = (),
) -> tuple[tuple[str, ...], str]:
    """Formats chat messages like `conversation`, up to the beginning of the last answer.

    Args:
        messages: as in `conversation`, but the last one may be a question.
        name: name of the list, for error messages.
        think: a key of `chat_template.THINK_MODES`.
        tools: the available functions, as `chat_template.tool_text` writes them.

    Returns:
        The parts of the prompt, each of which is tokenized separately, and the words of the last
        answer, "" if it is missing.

    Raises:
        ValueError: the value is not a list of messages with known roles, or has no question at the
            end.
    """
    _check_messages(messages, name)
    _mode(think)
    turns = [
        read_message(message, number) for number, message in enumerate(messages, 1)
    ]
    answer = ""
    if turns[-1].role == "assistant":
        answer = turns.pop().content
    if not turns or turns[-1].role not in ("user", "tool"):
        raise ValueError(f'"{name}" must end with a question, or with its answer')
    parts = write_conversation(
        turns, think=think, tools=tools, must_call=False, ask=True
    )
    return tuple(part.text for part in parts), answer


def _check_messages(messages: Any, name: str) -> None:
    """Raises ValueError unless a value is a non-empty list."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"{name}" must be a list of messages')


def _mode(think: Any) -> ThinkMode:
    """Returns the think mode that a record names."""
    try:
        return think_mode(think)
    except ValueError as error:
        raise ValueError(f'"think": {error}') from None


def _is_learnt(message: Mapping[str, Any], number: int) -> bool:
    """Returns whether an answer counts in the loss according to its message."""
    for name in WEIGHTS:
        weight = message.get(name)
        # True and False are equal to 1 and 0.
        if weight is not None and weight not in (0, 1):
            raise ValueError(
                f'message {number}: "{name}" must be 0 or 1; got {weight!r:.40}'
            )
        if weight is not None and not weight:
            return False
    return True


def read_message(message: Any, number: int) -> Message:
    """Parses a message and removes blank lines from its texts."""
    if not isinstance(message, Mapping):
        raise ValueError(
            f"message {number}: must be an object; got {type(message).__name__}"
        )
    message = without_nulls(message)
    is_sharegpt = "from" in message and "role" not in message
    role = message.get("from" if is_sharegpt else "role")
    if isinstance(role, str):
        role = _ROLES.get(role.lower(), role.lower())
    if not isinstance(role, str) or role not in SPEAKERS:
        raise ValueError(
            f"message {number}: role must be {', '.join(SPEAKERS)}; got {role!r:.60}, and "
            f"{keys_of(message)}"
        )
    try:
        return _turn(message, role, "value" if is_sharegpt else "content")
    except ValueError as error:
        raise ValueError(f"message {number}: {error}") from None


def _turn(message: Mapping[str, Any], role: str, key: str) -> Message:
    """Parses the text of a message, the thoughts before it and the tool calls after it."""
    if role != "assistant":
        return Message(role, _message_text(message, key))
    calls = _calls(message)
    # An answer that only calls a function has no content or an empty one.
    content = ""
    if not calls or key in message:
        content = _message_text(message, key)
    thought = None
    held = thoughts_in(message)
    if name := only_name(held, _THOUGHTS):
        thought = clean_message(text_field(held, name).decode())
        if content.startswith(THOUGHT_BEGIN):
            raise ValueError(
                f'"{name}", and an answer that begins with {THOUGHT_BEGIN}'
            )
    return Message(role, content, thought, calls)


def thoughts_in(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields with thoughts of a message, or of a record with one question.

    Blank thoughts are dropped, because empty thought marks would contain a blank line, which ends a
    turn.
    """
    found = {}
    for name in _THOUGHTS:
        value = fields.get(name)
        if value and str(value).strip().lower() not in ("", *_SWITCHES):
            found[name] = value
    return found


def _calls(message: Mapping[str, Any]) -> tuple[str, ...]:
    """Writes the functions that an answer calls."""
    calls = message.get("tool_calls") or []
    # OpenAI's older API has a single call.
    if not calls and message.get("function_call"):
        calls = [message["function_call"]]
    if not isinstance(calls, list):
        raise ValueError('"tool_calls" must be a list')
    return tuple(call_text(call) for call in calls)


def _message_text(message: Mapping[str, Any], key: str) -> str:
    """Reads the text of a message, which may be a list of parts as in OpenAI's API."""
    parts = message.get(key)
    if not isinstance(parts, list):
        return clean_message(text_field(message, key).decode())
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(
                f'"{key}" must hold parts of type "text"; got {kind!r:.60}'
            )
        texts.append(text_field(part, "text").decode())
    return clean_message("".join(texts))
