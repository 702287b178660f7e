"""JSON files, with or without the records of a data set."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from rwkv7_jax.data.documents import Document
from rwkv7_jax.data.jsonl import ReadStats, decode_json
from rwkv7_jax.data.records.conversations import is_conversation
from rwkv7_jax.data.records.record import names_record, parse_record
from rwkv7_jax.data.text_files import AS_BYTES, TextFile

# Suffixes of files with one JSON value per line.
LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")


def json_records(
    path: Path, *, encoding: str | None = None, must_hold: bool = False
) -> list[Any] | None:
    """Reads the records of a `.json` file: a list of them, or one per line.

    A list with any object counts as a list of records; its other items are bad records.

    Args:
        path: path of the file.
        encoding: encoding of its text; None for UTF-8.
        must_hold: reject a file that begins like JSON but is not, such as a truncated download.

    Returns:
        The records; None if the file is to be read as text, because it is not JSON or other JSON.

    Raises:
        ValueError: the JSON is damaged although it must hold records, there are records under two
            names, or an object of a file of records has a key twice.
    """
    lines = list(TextFile(path, encoding).lines())
    # The first character rules out most other files without parsing them.
    first = next((line for line in lines if line.strip()), b"")
    if not first.lstrip().startswith((b"[", b"{")):
        return None
    repeated: list[str] = []
    records = _records_of(lines, path, must_hold=must_hold, on_repeat=repeated.append)
    # Files without records are read as text, whatever their keys are.
    if records is not None and repeated:
        raise ValueError(
            f'documents: `{path}` has "{repeated[0][:40]}" twice in one object; {AS_BYTES}.'
        )
    return records


def _records_of(
    lines: list[bytes],
    path: Path,
    *,
    must_hold: bool,
    on_repeat: Callable[[str], Any],
) -> list[Any] | None:
    """Returns the records of the lines of a file; see `json_records` and `decode_json`."""
    try:
        content = decode_json(b"".join(lines), allow_nan=False, on_repeat=on_repeat)
    except ValueError as error:
        content = _of_lines(lines, on_repeat)
        if content is None and must_hold:
            raise ValueError(
                f"documents: `{path}` is damaged or truncated JSON: {error}; {AS_BYTES}."
            ) from None
    else:
        if isinstance(content, dict):
            return _of_object(content, path)
        if is_conversation(content):
            return [content]
    if not isinstance(content, list):
        return None
    holds_records = any(isinstance(item, dict) or is_record(item) for item in content)
    return content if holds_records else None


def _of_lines(lines: list[bytes], on_repeat: Callable[[str], Any]) -> list[Any] | None:
    """Decodes one value per line; returns None if a line is not JSON."""
    values = []
    for line in lines:
        if not line.strip():
            continue
        try:
            values.append(decode_json(line, allow_nan=False, on_repeat=on_repeat))
        except ValueError:
            return None
    return values


def is_record(value: Any) -> bool:
    """Returns whether a value is a valid record."""
    try:
        parse_record(value)
    except ValueError:
        return False
    return True


def _are_records(value: Any) -> bool:
    """Returns whether a value is a list of records: one is valid, or all have a record's keys."""
    if not isinstance(value, list) or not value:
        return False
    return any(map(is_record, value)) or all(map(names_record, value))


def _of_object(content: dict[str, Any], path: Path) -> list[Any] | None:
    """Returns the records of a file that is one object; None if it holds none.

    The object is either a record or holds a list of records under a name. A single object is more
    often a settings file.
    """
    if is_record(content):
        return [content]
    names = [name for name, value in content.items() if _are_records(value)]
    if len(names) > 1:
        raise ValueError(
            f'documents: `{path}` holds records under "{names[0]}" and "{names[1]}": write those '
            f"to be read to their own file; {AS_BYTES}."
        )
    if names:
        return content[names[0]]
    rows = _of_table(content)
    if rows is not None:
        return rows
    return [content] if names_record(content) else None


def _of_table(content: dict[str, Any]) -> list[Any] | None:
    """Returns the rows of a table that was written as one object; None if it is not a table.

    Sources: pandas.DataFrame.to_json with `orient` "columns" (the default), "index" or "split", and
    the responses of Hugging Face's dataset server.
    """
    names = content.get("columns")
    cells = content.get("data")
    if _is_list_of(names, str) and _is_list_of(cells, list):
        if all(len(row) == len(names) for row in cells):
            return [dict(zip(names, row, strict=True)) for row in cells]
    rows = content.get("rows")
    if _is_list_of(rows, dict) and all("row" in row for row in rows):
        return [row["row"] for row in rows]
    values = list(content.values())
    if not _is_list_of(values, dict):
        return None
    if all(map(names_record, values)):
        return values
    if any(column.keys() != values[0].keys() for column in values):
        return None
    rows = [{name: content[name][row] for name in content} for row in values[0]]
    return rows if names_record(content) or any(map(is_record, rows)) else None


def _is_list_of(value: Any, kind: type) -> TypeGuard[list[Any]]:
    """Returns whether a value is a non-empty list with only items of one type."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, kind) for item in value)


def parse_json_records(
    path: Path,
    records: list[Any],
    *,
    on_bad: str,
    stats: ReadStats,
) -> Iterator[Document]:
    """Yields documents from the records of a `.json` file.

    Raises:
        ValueError: a record is bad; the message is `file: record number: reason`.
    """
    for number, record in enumerate(records, 1):
        try:
            document = parse_record(record)
        except ValueError as error:
            reason = f"{path}: record {number}: {error}; `as_bytes` reads the file as plain text"
            stats.report(reason, on_bad)
            continue
        yield document


def is_one_list(path: Path, encoding: str | None) -> bool:
    """Returns whether a JSON Lines file is actually one list of records.

    A line may also be a list: a conversation, or a mistake. Such a line is valid JSON by itself and
    is followed by others.
    """
    lines = _filled_lines(path, encoding)
    first = next(lines, b"")
    if not first.startswith(b"["):
        return False
    if next(lines, None) is None:
        return True
    try:
        decode_json(first, allow_nan=False)
    except ValueError:
        return True
    return False


def _filled_lines(path: Path, encoding: str | None) -> Iterator[bytes]:
    """Yields the non-blank lines without surrounding whitespace."""
    return filter(None, map(bytes.strip, TextFile(path, encoding).lines()))


def refuse_lines_of_records(path: Path, encoding: str | None) -> None:
    """Rejects a plain text file whose first line is a record or a list of records.

    Raises:
        ValueError: the file holds records.
    """
    head = next(TextFile(path, encoding).chunks(), b"")
    # The first character rules out most files before reading a line, which may be the whole file.
    if not head.lstrip().startswith((b"{", b"[")):
        return
    first = next(_filled_lines(path, encoding), b"")
    try:
        value = decode_json(first, allow_nan=False)
    except ValueError:
        return
    if is_record(value) or names_record(value) or _are_records(value):
        raise ValueError(
            f"documents: `{path}` holds records as lines of JSON, but its name says that it is "
            f"plain text: rename it to {path.stem}.jsonl; {AS_BYTES}."
        )
