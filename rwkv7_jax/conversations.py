"""Lines of .jsonl files as documents: texts, questions with answers, conversations. Level 2.

One line is one object with one of

    {"text": ...}                                         all of it is learnt
    {"prompt": ..., "answer": ...}                        as they stand; the answer is learnt
    {"messages": [{"role": ..., "content": ...}, ...]}    World's chat; the assistant is learnt

and a conversation reads, up to token 0,

    System: ...

    User: ...

    Assistant: ...

    User: ...

Turns end at a blank line, so blank lines inside of them go; learnt are the assistant's words, from
the space behind its name, and token 0.
"""

import re
from collections.abc import Mapping
from typing import Any

from .documents import Document, Piece

NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}
_KINDS = ("text", "prompt", "messages")


def document_of(record: Any) -> Document:
    """The document that one line describes.

    Raises:
        ValueError: it describes none; the message is the reason alone.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"no object but {type(record).__name__}")
    kinds = [kind for kind in _KINDS if kind in record]
    if not kinds:
        raise ValueError('no object with a "text", a "prompt" or "messages"')
    if len(kinds) > 1:
        raise ValueError(f'"{kinds[0]}" and "{kinds[1]}" in one object')
    if kinds == ["text"]:
        return Document((Piece(_bytes(record, "text")),))
    if kinds == ["prompt"]:
        return _answered(record)
    return conversation(record["messages"])


def _bytes(record: Mapping[str, Any], name: str) -> bytes:
    """The string under `name`."""
    if name not in record:
        raise ValueError(f'no "{name}"')
    if not isinstance(record[name], str):
        raise ValueError(f'"{name}" is no string but {type(record[name]).__name__}')
    try:
        return record[name].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'"{name}" has a lone surrogate at character {error.start}') from None


def _answered(record: Mapping[str, Any]) -> Document:
    answer = _bytes(record, "answer")
    if not answer:
        raise ValueError('"answer" is empty')
    return Document((Piece(_bytes(record, "prompt"), learnt=False), Piece(answer)))


def conversation(messages: Any) -> Document:
    """Messages in World's template; of each answer, what is before it is one piece that is read.

    Raises:
        ValueError: no list of messages with known roles, or one that ends without an answer.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is no list of messages')
    pieces, read = [], ""
    for number, message in enumerate(messages, 1):
        role, content = _message(message, number)
        read += "\n\n" * (number > 1) + f"{NAMES[role]}:"
        if role != "assistant":
            read += f" {content}"
            continue
        if not content:
            raise ValueError(f"message {number}: an empty answer")
        pieces += [Piece(read.encode(), learnt=False), Piece(f" {content}".encode())]
        read = ""
    if read:
        raise ValueError('"messages" do not end with an answer of the assistant')
    return Document(tuple(pieces))


def _message(message: Any, number: int) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number}: no object but {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or role not in NAMES:
        raise ValueError(f"message {number}: role must be {', '.join(NAMES)}; got {role!r}")
    try:
        content = _bytes(message, "content").decode()
    except ValueError as error:
        raise ValueError(f"message {number}: {error}") from None
    return role, re.sub(r"\s*\n\s*\n", "\n", content.replace("\r\n", "\n")).strip()
