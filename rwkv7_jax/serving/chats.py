"""The fields of a chat request: the conversation, the think mode and the callable functions.

Sources: platform.openai.com/docs/api-reference/chat for `tools` and `reasoning_effort`; vLLM for
`chat_template_kwargs`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rwkv7_jax.data.records.conversations import read_message
from rwkv7_jax.serving.fields import Fields, Refused, kind_of
from rwkv7_jax.text.chat_template import (
    THINK_MODES,
    Message,
    answer_opening,
    tool_texts,
    write_conversation,
)

# The think mode for each value of `reasoning_effort` in OpenAI's API.
EFFORTS = {
    "none": "off",
    "minimal": "fast",
    "low": "short",
    "medium": "medium",
    "high": "long",
}

_TEMPLATE_FIELDS = ("enable_thinking",)


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation to continue with the next message.

    Attributes:
        parts: the parts of the prompt, each encoded separately.
        opening: the start of the answer, which is already in the prompt.
        tools: the callable functions, as `chat_template.tool_texts` formats them.
        parallel: whether an answer may have several function calls.
    """

    parts: tuple[str, ...]
    opening: str
    tools: tuple[str, ...] = ()
    parallel: bool = True


def read_chat(fields: Fields) -> Chat:
    """Takes the fields that only chats have.

    Raises:
        Refused: a field is invalid, or two fields contradict each other.
    """
    think = _think_mode(fields)
    tools = _tools(fields)
    parts = _prompt(fields.take("messages"), think, tools)
    return Chat(
        parts=parts,
        opening=answer_opening(think),
        tools=tools,
        parallel=fields.switch("parallel_tool_calls", default=True),
    )


def _think_mode(fields: Fields) -> str:
    """Takes the think mode, which any of three fields may set."""
    think = _choice(fields, "think", THINK_MODES)
    effort = _choice(fields, "reasoning_effort", EFFORTS)
    if effort is not None:
        meant = EFFORTS[effort]
        if think not in (None, meant):
            raise Refused(
                f"`think` must be {meant!r}, the think mode of `reasoning_effort` {effort!r}, or "
                f"left out; got {think!r}.",
                "think",
            )
        think = meant
    switch = _enable_thinking(fields)
    if switch is None:
        return "off" if think is None else think
    if think is None:
        # As in the exported Jinja template.
        return "free" if switch else "fast"
    if switch != (THINK_MODES[think].filler is None):
        raise Refused(
            "`chat_template_kwargs.enable_thinking` must agree with the think mode of `think` or "
            f"`reasoning_effort`, {think!r}; got {str(switch).lower()}.",
            "chat_template_kwargs",
        )
    return think


def _choice(fields: Fields, name: str, known: Mapping[str, Any]) -> str | None:
    """Takes a string that must be one of the known values; None if it is absent."""
    value = fields.text(name, None)
    if value is not None and value not in known:
        raise Refused(
            f"`{name}` must be one of {', '.join(known)}; got {value!r:.60}.", name
        )
    return value


def _enable_thinking(fields: Fields) -> bool | None:
    """Takes the only known variable of the chat template; None if it is absent."""
    name = "chat_template_kwargs"
    variables = fields.members(name)
    for variable, value in variables.items():
        if variable not in _TEMPLATE_FIELDS or not isinstance(value, bool):
            raise Refused(
                f"`{name}.{variable:.60}` must have the name {', '.join(_TEMPLATE_FIELDS)} and the "
                "value true or false.",
                name,
            )
    return variables.get("enable_thinking")


def _tools(fields: Fields) -> tuple[str, ...]:
    """Takes the callable functions, as the template formats them."""
    tools = fields.items("tools")
    choice = fields.optional("tool_choice", "auto")
    for tool in tools:
        _check_tool(tool)
    try:
        texts = tool_texts(tools)
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise Refused("`tools` has a lone surrogate.", "tools") from None
    except ValueError as error:
        raise Refused(f"`tools`: {error}.", "tools") from None
    if choice not in ("auto", "none"):
        kind = repr(choice) if isinstance(choice, str) else kind_of(choice)
        raise Refused(
            "`tool_choice` must be 'auto' or 'none', because a call cannot be enforced; got "
            f"{kind:.60}.",
            "tool_choice",
        )
    return texts if choice == "auto" else ()


def _check_tool(tool: Any) -> None:
    """Raises for a tool that is not a function, and for `strict`, which cannot be enforced."""
    if not isinstance(tool, dict):
        return
    kind = tool.get("type") or "function"
    if kind != "function":
        raise Refused(f"`tools` must be of type 'function'; got {kind!r:.60}.", "tools")
    function = tool.get("function")
    described = function if isinstance(function, dict) else tool
    if described.get("strict"):
        raise Refused(
            "`tools` must not be `strict`, because schemas are not enforced; leave it out.",
            "tools",
        )


def _prompt(messages: Any, think: str, tools: Sequence[str]) -> tuple[str, ...]:
    """Formats a conversation up to the start of the next answer, in the same parts as in tuning.

    Later messages do not change the token ids of earlier ones, so the cache finds them again.
    """
    if not isinstance(messages, list) or not messages:
        raise Refused("`messages` must be a list of messages.", "messages")
    try:
        turns = [read_message(message, at) for at, message in enumerate(messages, 1)]
        turns = _in_order_of_calls(turns, messages)
        # As in `rwkv7 generate`, an empty system message has no turn.
        turns = [turn for turn in turns if turn.content or turn.role != "system"]
        # `must_call` is false because "auto" lets the model choose between text and a call.
        parts = write_conversation(
            turns, think=think, tools=tools, must_call=False, ask=True
        )
    except ValueError as error:
        raise Refused(f"`messages`: {error}.", "messages") from None
    except RecursionError:
        raise Refused("`messages` is nested too deeply.", "messages") from None
    if not turns or turns[-1].role == "assistant":
        raise Refused(
            "`messages` must end with a message for the assistant to answer.",
            "messages",
        )
    return tuple(part.text for part in parts)


def _in_order_of_calls(
    turns: Sequence[Message], messages: Sequence[Mapping[str, Any]]
) -> list[Message]:
    """Sorts the results of functions into the order of their calls: the template has no ids.

    Raises:
        ValueError: no call in the previous answer has the id of a result.
    """
    keys: list[tuple[int, int]] = []
    answer = 0
    places: dict[str, int] = {}
    for number, (turn, message) in enumerate(zip(turns, messages, strict=True), 1):
        if turn.role != "tool":
            answer = number
            calls = message.get("tool_calls") if turn.calls else None
            places = _first_places([call.get("id") for call in calls or []])
            keys.append((number, 0))
            continue
        id = message.get("tool_call_id")
        # Use `repr`: an invalid id may be a list, which cannot be a dict key.
        if id is not None and repr(id) not in places:
            raise ValueError(
                f'message {number}: "tool_call_id" must be that of a call in the previous answer; '
                f"got {id!r:.60}"
            )
        keys.append((answer, number if id is None else places[repr(id)]))
    order = sorted(range(len(turns)), key=keys.__getitem__)
    return [turns[at] for at in order]


def _first_places(ids: Sequence[Any]) -> dict[str, int]:
    """Maps the `repr` of each id to its first position."""
    places: dict[str, int] = {}
    for place, id in enumerate(ids):
        places.setdefault(repr(id), place)
    return places
