"""Files of JSON that hold the records of a data set, and such that do not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv7_jax.data.documents import Document
from rwkv7_jax.data.jsonl import ReadStats, decode_json
from rwkv7_jax.data.records.record import KINDS, parse_record
from rwkv7_jax.data.text_files import AS_BYTES, TextFile

# Files with these suffixes have a JSON value on each line.
LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")

_NAMES_OF_RECORDS = (*KINDS, "conversations")


def json_records(
    path: Path, *, encoding: str | None = None, must_hold: bool = False
) -> list[Any] | None:
    """Reads the records of a `.json` file: a list of objects, or an object on every line.

    Args:
        path: of the file.
        encoding: of its text; None is UTF-8.
        must_hold: refuses a file that begins as JSON and is none, as a cut download is.

    Returns:
        The records; None where the file is another kind of JSON or none, and so a text.

    Raises:
        ValueError: damaged JSON where records must be, or records under two names.
    """
    lines = list(TextFile(path, encoding).lines())
    data = b"".join(lines)
    # Most other files are told by their first character, without parsing all of them.
    if not data.lstrip().startswith((b"[", b"{")):
        return None
    try:
        content = decode_json(data, allow_nan=False)
    except ValueError as error:
        content = _of_lines(lines)
        if content is None and must_hold:
            raise ValueError(
                f"documents: `{path}` is damaged JSON or was cut: {error}; {AS_BYTES}."
            ) from None
    if isinstance(content, dict):
        return _of_object(content, path)
    return content if _is_list_of_objects(content) else None


def _of_lines(lines: list[bytes]) -> list[Any] | None:
    """Decodes a value on each line; None where a line is no JSON."""
    try:
        return [decode_json(line, allow_nan=False) for line in lines if line.strip()]
    except ValueError:
        return None


def _is_list_of_objects(content: Any) -> bool:
    if not isinstance(content, list) or not content:
        return False
    return all(isinstance(record, dict) for record in content)


def is_record(value: Any) -> bool:
    """Tells whether a value is a record that can be read."""
    try:
        parse_record(value)
    except ValueError:
        return False
    return True


def _of_object(content: dict[str, Any], path: Path) -> list[Any] | None:
    """Returns the records of a file that is one object.

    It is a record itself, or a list of records lies under a name. A single object is a settings
    file more often than a record.
    """
    if is_record(content):
        return [content]
    names = []
    for name, value in content.items():
        if _is_list_of_objects(value) and is_record(value[0]):
            names.append(name)
    if len(names) > 1:
        raise ValueError(
            f'documents: `{path}` holds records under "{names[0]}" and "{names[1]}": write those '
            f"that are meant to a file of their own; {AS_BYTES}."
        )
    if names:
        return content[names[0]]
    return [content] if any(kind in content for kind in _NAMES_OF_RECORDS) else None


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
            stats.report(reason, on_bad)
            continue
        yield document


def begins_with_list(path: Path, encoding: str | None) -> bool:
    """Tells whether a file that should have an object on each line is one list."""
    head = next(TextFile(path, encoding).chunks(), b"")
    return head.lstrip().startswith(b"[")


def refuse_lines_of_records(path: Path, encoding: str | None) -> None:
    """Refuses a text whose first line is a record: its name promises prose.

    Raises:
        ValueError: the file holds lines of JSON.
    """
    head = next(TextFile(path, encoding).chunks(), b"")
    first = head.split(b"\n", 1)[0]
    if not first.startswith(b"{"):
        return
    try:
        record = decode_json(first, allow_nan=False)
    except ValueError:
        return
    if is_record(record):
        raise ValueError(
            f"documents: `{path}` holds records as lines of JSON, and its name says that it is "
            f"plain text: call it {path.stem}.jsonl; {AS_BYTES}."
        )
