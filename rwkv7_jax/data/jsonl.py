"""The reader of all .jsonl files, and their lines as documents.

A line of data is one object with one of

    {"text": ...}                                         all of it is in the loss
    {"prompt": ..., "answer": ...}                        as they stand; the answer is in the loss
                                                          ("completion" is another name of it)
    {"messages": [{"role": ..., "content": ...}, ...]}    a chat; the assistant is in the loss
    {"conversations": [{"from": ..., "value": ...}, ...]} the same, as ShareGPT has it
    {"instruction": ..., "input": ..., "output": ...}     the same of one question, as Alpaca has it
                                                          (`_QUESTIONS` and what follows it are
                                                          the names that other data sets use)

and a conversation is written as `text.chat_template` says, up to token 0. A blank line ends a turn,
so blank lines inside a turn are removed. In the loss are the assistant's words, from the space
after its name, and token 0. A record with a conversation may name a think mode ("think") and hold
functions ("tools"); an assistant may have thoughts ("reasoning_content") and call functions
("tool_calls"), and role "tool" says what they gave.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rwkv7_jax.checks import check_choice, prefix_errors
from rwkv7_jax.data.choices import ON_BAD
from rwkv7_jax.data.documents import Document, Segment
from rwkv7_jax.data.text_files import TextFile
from rwkv7_jax.text.chat_template import (
    SPEAKERS,
    Message,
    call_text,
    clean_message,
    read_tools,
    think_mode,
    thinks,
    tool_texts,
    write_conversation,
)

_KINDS = ("text", "prompt", "messages")

# Names of what follows a prompt as it stands; the second one is of TRL.
_ANSWERS_AS_THEY_STAND = ("answer", "completion")

# Names of one question with an answer in Alpaca, Dolly, OpenOrca, MetaMathQA and GSM8K.
_QUESTIONS = ("instruction", "question", "query")
_CONTEXTS = ("input", "context")
_ANSWERS = ("output", "response", "answer")
_SYSTEM_TEXTS = ("system", "system_prompt")

# Names that other tools give the roles, in lower case.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}

# Keys of a record that a message names; more would not help.
_SHOWN_KEYS = 8

Parsed = TypeVar("Parsed")


@dataclasses.dataclass
class ReadStats:
    """Progress of reading; it changes while documents are taken.

    Attributes:
        bytes: read so far.
        skipped: lines that were left out.
        first_error: why the first of them was, as `file:line: reason`.
        passed_over: files of a folder that are no texts.
        not_utf8: files of text whose bytes are not UTF-8.
        first_not_utf8: the first of them.
    """

    bytes: int = 0
    skipped: int = 0
    first_error: str = ""
    passed_over: int = 0
    # Left out of comparisons: these fields only explain.
    not_utf8: int = dataclasses.field(default=0, compare=False)
    first_not_utf8: str = dataclasses.field(default="", compare=False)

    def skip(self, reason: str) -> None:
        """Counts a line that is left out."""
        self.skipped += 1
        self.first_error = self.first_error or reason

    def note_not_utf8(self, file: str) -> None:
        """Counts a file whose bytes are read as they stand."""
        self.not_utf8 += 1
        self.first_not_utf8 = self.first_not_utf8 or file


def read_jsonl(
    path: str | Path,
    parse: Callable[[Any], Parsed],
    *,
    on_bad: str = "error",
    drop_torn_end: bool = False,
    allow_nan: bool = False,
    stats: ReadStats | None = None,
    encoding: str | None = None,
) -> Iterator[Parsed]:
    """Yields `parse(record)` for the record of every line; blank lines are passed over.

    Args:
        path: of a .jsonl file, which may be compressed.
        parse: raises ValueError with a reason where a record is not as it must be.
        on_bad: "error", or "skip" for lines that are no JSON or cannot be parsed.
        drop_torn_end: drops a last line that breaks off, as a killed writer leaves it, with a
            warning.
        allow_nan: accepts NaN and infinities as numbers; data must not hold them.
        stats: counts what is read and skipped.
        encoding: of the text; None is UTF-8.

    Raises:
        ValueError: a bad line, as `file:line: reason`.
    """
    with prefix_errors("read_jsonl"):
        check_choice(on_bad, ON_BAD, "`on_bad`")
    stats = stats or ReadStats()
    # Lines are split as bytes: a line separator such as U+2028 inside a string ends no line.
    for number, line in enumerate(TextFile(Path(path), encoding).lines(), 1):
        stats.bytes += len(line)
        if not line.strip():
            continue
        try:
            record = _decode(line, allow_nan=allow_nan)
        except ValueError as error:
            breaks_off = not line.endswith(b"\n")
            if drop_torn_end and breaks_off:
                warnings.warn(
                    f"{path}:{number}: dropped; the line breaks off.", stacklevel=3
                )
                return
            end = "; the file ends inside this line" if breaks_off else ""
            _report(f"{path}:{number}: {error}{end}", on_bad, stats)
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
    if len(kinds) > 1:
        raise ValueError(f'"{kinds[0]}" and "{kinds[1]}" in one object')
    if kinds == ["text"]:
        return Document((Segment(_field(record, "text")),))
    if kinds == ["prompt"]:
        return _answered_prompt(record)
    if kinds == ["messages"]:
        return _chat(record, record["messages"])
    if "conversations" in record:
        messages = _with_system(record, record["conversations"])
        return _chat(record, messages, "conversations")
    question = "instruction"
    answer = "output"
    # Alpaca's two names count, whatever else a record holds.
    if question not in record or answer not in record:
        question = _only_name(record, _QUESTIONS)
        answer = _only_name(record, _ANSWERS)
    if question and answer:
        return _one_question(record, question, answer)
    raise ValueError(
        'must have a "text", a "prompt" or "messages" (or "conversations", "instruction" and '
        f'"output", or "question" and "answer"); {_keys_of(record)}'
    )


def _only_name(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Returns the one of `names` that a record has; None where it has none.

    Raises:
        ValueError: it has two.
    """
    present = [name for name in names if name in record]
    if len(present) > 1:
        raise ValueError(f'"{present[0]}" and "{present[1]}" in one object')
    return present[0] if present else None


def _optional(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Returns the one of `names` under which a record has something; see `_only_name`."""
    return _only_name({key: value for key, value in record.items() if value}, names)


def _keys_of(record: Mapping[str, Any]) -> str:
    """Lists the keys of a record, for a message."""
    if not record:
        return "it has no keys"
    shown = [f'"{key[:40]}"' for key in list(record)[:_SHOWN_KEYS]]
    if len(record) > _SHOWN_KEYS:
        shown.append("...")
    return f"its keys are {', '.join(shown)}"


def _with_system(record: Mapping[str, Any], messages: Any) -> Any:
    """Puts a record's system text before its messages."""
    name = _optional(record, _SYSTEM_TEXTS)
    if not name or not isinstance(messages, list):
        return messages
    return [{"role": "system", "content": record[name]}, *messages]


def _one_question(
    record: Mapping[str, Any], question_name: str, answer_name: str
) -> Document:
    """Makes a conversation of a question and its answer; the context follows on a new line.

    A "history" of earlier questions and answers comes first, as LLaMA-Factory has it.
    """
    question = _field(record, question_name).decode()
    if context := _optional(record, _CONTEXTS):
        question += "\n" + _field(record, context).decode()
    messages = []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise ValueError('"history" must be a list of pairs')
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError('"history" must be a list of pairs')
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    answer = _field(record, answer_name).decode()
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": answer})
    return _chat(record, _with_system(record, messages))


def _chat(record: Mapping[str, Any], messages: Any, name: str = "messages") -> Document:
    """Makes a document of a conversation and what its record says of thoughts and functions."""
    tools = record.get("tools") or []
    try:
        # Some data sets hold the list as text.
        texts = read_tools(tools) if isinstance(tools, str) else tool_texts(tools)
    except ValueError as error:
        raise ValueError(f'"tools": {error}') from None
    think = record.get("think") or "off"
    return conversation(messages, name, think=think, tools=texts)


def json_records(path: Path, *, encoding: str | None = None) -> list[Any] | None:
    """Reads the records of a `.json` file: a list of objects, or an object on every line.

    Returns:
        The records; None where the file is another kind of JSON or none, and so a text.
    """
    lines = list(TextFile(path, encoding).lines())
    data = b"".join(lines)
    # Most other files are told by their first character, without parsing all of them.
    if not data.lstrip().startswith((b"[", b"{")):
        return None
    try:
        content = _decode(data, allow_nan=False)
    except ValueError:
        try:
            content = [_decode(line, allow_nan=False) for line in lines if line.strip()]
        except ValueError:
            return None
    if isinstance(content, dict):
        # A single object is a settings file more often than a record.
        is_record = any(kind in content for kind in (*_KINDS, "conversations"))
        return [content] if is_record else None
    if not isinstance(content, list) or not content:
        return None
    return content if all(isinstance(record, dict) for record in content) else None


def parse_json_records(
    path: Path,
    records: list[Any],
    *,
    on_bad: str,
    stats: ReadStats,
) -> Iterator[Document]:
    """Makes documents of the records of a `.json` file.

    Raises:
        ValueError: a bad record, as `file: record number: reason`.
    """
    for number, record in enumerate(records, 1):
        try:
            document = parse_record(record)
        except ValueError as error:
            reason = f"{path}: record {number}: {error}; `as_bytes` reads the file as plain text"
            _report(reason, on_bad, stats)
            continue
        yield document


def _field(record: Mapping[str, Any], name: str) -> bytes:
    """Returns the string called `name` as UTF-8."""
    if name not in record:
        raise ValueError(f'no "{name}"; {_keys_of(record)}')
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
    name = _only_name(record, _ANSWERS_AS_THEY_STAND) or "answer"
    answer = _field(record, name)
    if not answer:
        raise ValueError(f'"{name}" is empty')
    prompt = Segment(_field(record, "prompt"), in_loss=False)
    return Document((prompt, Segment(answer)))


def conversation(
    messages: Any,
    name: str = "messages",
    *,
    think: Any = "off",
    tools: Sequence[str] = (),
) -> Document:
    """Formats chat messages in RWKV-7's template; only assistant turns are in the loss.

    Args:
        messages: objects with "role" and "content", or with ShareGPT's "from" and "value".
        name: of the list, for messages.
        think: one of `chat_template.THINK_MODES`.
        tools: functions that may be called, as `chat_template.tool_text` writes them.

    Raises:
        ValueError: no list of messages with known roles, one that ends without an answer, or an
            answer without thoughts under a think mode that needs them.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"{name}" must be a list of messages')
    try:
        must_think = think_mode(think).filler is None
    except ValueError as error:
        raise ValueError(f'"think": {error}') from None
    turns = []
    for number, message in enumerate(messages, 1):
        turn = _message(message, number)
        if turn.role == "assistant":
            if not (turn.content or turn.calls):
                raise ValueError(f"message {number}: an empty answer")
            if must_think and not thinks(turn):
                raise ValueError(
                    f'message {number}: must have a "reasoning_content", or begin with <think, '
                    f'under "think" {think!r}'
                )
        turns.append(turn)
    if turns[-1].role != "assistant":
        raise ValueError(f'"{name}" do not end with an answer of the assistant')
    segments = []
    for part in write_conversation(turns, think=think, tools=tools):
        segments.append(Segment(part.text.encode(), in_loss=part.is_answer))
    return Document(tuple(segments))


def _message(message: Any, number: int) -> Message:
    """Reads a message, blank lines removed from its texts."""
    if not isinstance(message, Mapping):
        raise ValueError(
            f"message {number}: must be an object; got {type(message).__name__}"
        )
    is_sharegpt = "from" in message and "role" not in message
    role = message.get("from" if is_sharegpt else "role")
    if isinstance(role, str):
        role = _ROLES.get(role.lower(), role.lower())
    if not isinstance(role, str) or role not in SPEAKERS:
        raise ValueError(
            f"message {number}: role must be {', '.join(SPEAKERS)}; got {role!r}"
        )
    try:
        return _turn(message, role, "value" if is_sharegpt else "content")
    except ValueError as error:
        raise ValueError(f"message {number}: {error}") from None


def _turn(message: Mapping[str, Any], role: str, key: str) -> Message:
    """Reads what is said in a message, thought before it and called after it."""
    if role != "assistant":
        return Message(role, _said(message, key))
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError('"tool_calls" must be a list')
    # An answer that only calls a function has no content, or an empty one.
    content = ""
    if not calls or message.get(key) is not None:
        content = _said(message, key)
    thought = None
    if message.get("reasoning_content") is not None:
        thought = clean_message(_field(message, "reasoning_content").decode())
    return Message(role, content, thought, tuple(call_text(call) for call in calls))


def _said(message: Mapping[str, Any], key: str) -> str:
    """Reads the text of a message, which may be a list of parts as OpenAI's interface has it."""
    parts = message.get(key)
    if not isinstance(parts, list):
        return clean_message(_field(message, key).decode())
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(f'"{key}" must hold parts of type "text"; got {kind!r}')
        texts.append(_field(part, "text").decode())
    return clean_message("".join(texts))
