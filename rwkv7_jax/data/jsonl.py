"""The reader of all .jsonl files, and their lines as documents.

A line of data is one object with one of

    {"text": ...}                                         all of it is in the loss
    {"prompt": ..., "answer": ...}                        as they stand; the answer is in the loss
    {"messages": [{"role": ..., "content": ...}, ...]}    World's chat; the assistant is in the loss

and a conversation is written as `text.chat_template` says, up to token 0. A blank line ends a turn,
so blank lines inside a turn are removed. In the loss are the assistant's words, from the space
after its name, and token 0.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rwkv7_jax.data.choices import ON_BAD, check_choice
from rwkv7_jax.data.documents import Document, Segment
from rwkv7_jax.text.chat_template import SPEAKERS, TURN_END, turn_start

_KINDS = ("text", "prompt", "messages")

Parsed = TypeVar("Parsed")


@dataclasses.dataclass
class ReadStats:
    """Progress of reading; it changes while documents are taken.

    Attributes:
        bytes: read so far.
        skipped: lines that were left out.
        first_error: why the first of them was, as `file:line: reason`.
    """

    bytes: int = 0
    skipped: int = 0
    first_error: str = ""

    def skip(self, reason: str) -> None:
        """Counts a line that is left out."""
        self.skipped += 1
        self.first_error = self.first_error or reason


def read_jsonl(
    path: str | Path,
    parse: Callable[[Any], Parsed],
    *,
    on_bad: str = "error",
    drop_torn_end: bool = False,
    allow_nan: bool = False,
    stats: ReadStats | None = None,
) -> Iterator[Parsed]:
    """Yields `parse(record)` for the record of every line; blank lines are passed over.

    Args:
        path: of a .jsonl file.
        parse: raises ValueError with a reason where a record is not as it must be.
        on_bad: "error", or "skip" for lines that are no JSON or cannot be parsed.
        drop_torn_end: drops a last line that breaks off, as a killed writer leaves it, with a
            warning.
        allow_nan: accepts NaN and infinities as numbers; data must not hold them.
        stats: counts what is read and skipped.

    Raises:
        ValueError: a bad line, as `file:line: reason`.
    """
    check_choice(
        on_bad,
        ON_BAD,
        argument="on_bad",
        caller="read_jsonl",
    )
    stats = stats or ReadStats()
    # Lines are split as bytes: a line separator such as U+2028 inside a string ends no line.
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            stats.bytes += len(line)
            if not line.strip():
                continue
            try:
                record = _decode(line, allow_nan=allow_nan)
            except ValueError as error:
                if drop_torn_end and not line.endswith(b"\n"):
                    warnings.warn(
                        f"{path}:{number}: dropped; the line breaks off.", stacklevel=3
                    )
                    return
                _report(f"{path}:{number}: {error}", on_bad, stats)
                continue
            try:
                parsed = parse(record)
            except ValueError as error:
                _report(f"{path}:{number}: {error}", on_bad, stats)
                continue
            yield parsed


def read_log(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a log that a program appends to; none where the file is missing.

    A killed process may leave a line half written, to which the next one is glued: whatever is no
    object is passed over.
    """
    if not path.exists():
        return []
    return list(
        read_jsonl(
            path,
            check_object,
            on_bad="skip",
            allow_nan=True,
        )
    )


def _report(reason: str, on_bad: str, stats: ReadStats) -> None:
    if on_bad == "error":
        raise ValueError(reason) from None
    stats.skip(reason)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _decode(line: bytes, *, allow_nan: bool) -> Any:
    """Decodes a line, or raises ValueError with the reason alone."""
    if b"\0" in line[:4]:
        raise ValueError("begins with zero bytes, as UTF-16 does; it must be UTF-8")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise ValueError("begins with a byte order mark")
    try:
        return json.loads(text, parse_constant=None if allow_nan else _refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not one JSON object: {error.msg} at column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_object(record: Any) -> dict[str, Any]:
    """Returns a record that is an object; raises ValueError for another."""
    if not isinstance(record, dict):
        raise ValueError(f"must be an object; got {type(record).__name__}")
    return record


def parse_record(record: Any) -> Document:
    """Makes a document of the object on one line.

    Raises:
        ValueError: the record describes no document; the message is the reason alone.
    """
    record = check_object(record)
    kinds = [kind for kind in _KINDS if kind in record]
    if not kinds:
        raise ValueError('must have a "text", a "prompt" or "messages"')
    if len(kinds) > 1:
        raise ValueError(f'"{kinds[0]}" and "{kinds[1]}" in one object')
    if kinds == ["text"]:
        return Document((Segment(_field(record, "text")),))
    if kinds == ["prompt"]:
        return _answered_prompt(record)
    return conversation(record["messages"])


def _field(record: Mapping[str, Any], name: str) -> bytes:
    """Returns the string called `name` as UTF-8."""
    if name not in record:
        raise ValueError(f'no "{name}"')
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be a string; got {type(value).__name__}')
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f'"{name}" has a lone surrogate at character {error.start}'
        ) from None


def _answered_prompt(record: Mapping[str, Any]) -> Document:
    answer = _field(record, "answer")
    if not answer:
        raise ValueError('"answer" is empty')
    prompt = Segment(_field(record, "prompt"), in_loss=False)
    return Document((prompt, Segment(answer)))


def conversation(messages: Any) -> Document:
    """Formats chat messages in World's template; only assistant turns are in the loss.

    All that precedes an answer is one segment, so that a prompt has the ids it has in generation.

    Raises:
        ValueError: no list of messages with known roles, or one that ends without an answer.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" must be a list of messages')
    segments: list[Segment] = []
    prompt = ""
    for number, message in enumerate(messages, 1):
        role, content = _message(message, number)
        if number > 1:
            prompt += TURN_END
        prompt += turn_start(role)
        if role != "assistant":
            prompt += f" {content}"
            continue
        if not content:
            raise ValueError(f"message {number}: an empty answer")
        segments.append(Segment(prompt.encode(), in_loss=False))
        segments.append(Segment(f" {content}".encode()))
        prompt = ""
    if prompt:
        raise ValueError('"messages" do not end with an answer of the assistant')
    return Document(tuple(segments))


def _message(message: Any, number: int) -> tuple[str, str]:
    """Returns the role and the content of a message, blank lines removed from the content."""
    if not isinstance(message, Mapping):
        raise ValueError(
            f"message {number}: must be an object; got {type(message).__name__}"
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in SPEAKERS:
        raise ValueError(
            f"message {number}: role must be {', '.join(SPEAKERS)}; got {role!r}"
        )
    try:
        content = _field(message, "content").decode()
    except ValueError as error:
        raise ValueError(f"message {number}: {error}") from None
    content = content.replace("\r\n", "\n")
    return role, re.sub(r"\s*\n\s*\n", "\n", content).strip()
