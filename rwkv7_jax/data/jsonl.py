"""Lines of .jsonl files as documents: texts, questions with answers, conversations.

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

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rwkv7_jax.data.documents import Document, Segment

NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}

_KINDS = ("text", "prompt", "messages")


def parse_record(record: Any) -> Document:
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
        return Document((Segment(_bytes(record, "text")),))
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
    return Document((Segment(_bytes(record, "prompt"), learnt=False), Segment(answer)))


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
        pieces += [Segment(read.encode(), learnt=False), Segment(f" {content}".encode())]
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


Parsed = TypeVar("Parsed")


@dataclasses.dataclass
class ReadStats:
    """How far reading is; it changes while documents are taken.

    Attributes:
        bytes: of files that are read.
        skipped: lines that were left out.
        first: why the first of them was, as `file:line: reason`.
    """

    bytes: int = 0
    skipped: int = 0
    first: str = ""


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _record(line: bytes) -> Any:
    """What one line of a .jsonl file holds, or a ValueError that says why there is nothing."""
    if b"\0" in line[:4]:
        raise ValueError("begins with zero bytes, as UTF-16 does; it must be UTF-8")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise ValueError("begins with a byte order mark")
    try:
        return json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"not one JSON object: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_lines(
    path: str | Path,
    parse: Callable[[Any], Parsed],
    *,
    on_bad: str = "error",
    reading: ReadStats | None = None,
) -> Iterator[Parsed]:
    """What `parse` makes of each line's object; blank lines are nothing.

    Args:
        path: of a .jsonl file.
        parse: raises ValueError with a reason where an object is not what it shall be.
        on_bad: "error", or "skip" for lines that are no JSON or cannot be parsed.
        reading: counts what is read and skipped.

    Raises:
        ValueError: a bad line, as `file:line: reason`.
    """
    reading = reading or ReadStats()
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            reading.bytes += len(line)
            if not line.strip():
                continue
            try:
                parsed = parse(_record(line))
            except ValueError as error:
                reason = f"{path}:{number}: {error}"
                if on_bad == "error":
                    raise ValueError(reason) from None
                reading.skipped, reading.first = reading.skipped + 1, reading.first or reason
                continue
            yield parsed
