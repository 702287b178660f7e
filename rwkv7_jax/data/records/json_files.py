"""Files of JSON that hold the records of a data set, and such that do not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from rwkv7_jax.data.documents import Document
from rwkv7_jax.data.jsonl import ReadStats, decode_json
from rwkv7_jax.data.records.conversations import is_conversation
from rwkv7_jax.data.records.record import names_record, parse_record
from rwkv7_jax.data.text_files import AS_BYTES, TextFile

# Files with these suffixes have a JSON value on each line.
LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")


def json_records(
    path: Path, *, encoding: str | None = None, must_hold: bool = False
) -> list[Any] | None:
    """Reads the records of a `.json` file: a list of them, or one on every line.

    A list that holds any object is one of records: what else it holds is a bad record.

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
    else:
        if isinstance(content, dict):
            return _of_object(content, path)
        if is_conversation(content):
            return [content]
    if isinstance(content, list) and any(map(_is_object_or_record, content)):
        return content
    return None


def _of_lines(lines: list[bytes]) -> list[Any] | None:
    """Decodes a value on each line; None where a line is no JSON."""
    try:
        return [decode_json(line, allow_nan=False) for line in lines if line.strip()]
    except ValueError:
        return None


def _is_object_or_record(value: Any) -> bool:
    return isinstance(value, dict) or is_record(value)


def is_record(value: Any) -> bool:
    """Tells whether a value is a record that can be read."""
    try:
        parse_record(value)
    except ValueError:
        return False
    return True


def _are_records(value: Any) -> bool:
    """Tells whether a value is a list of records: one can be read, or all are meant as such."""
    if not isinstance(value, list) or not value:
        return False
    return any(map(is_record, value)) or all(map(names_record, value))


def _of_object(content: dict[str, Any], path: Path) -> list[Any] | None:
    """Returns the records of a file that is one object.

    It is a record itself, or a list of records lies under a name. A single object is a settings
    file more often than a record.
    """
    if is_record(content):
        return [content]
    names = [name for name, value in content.items() if _are_records(value)]
    if len(names) > 1:
        raise ValueError(
            f'documents: `{path}` holds records under "{names[0]}" and "{names[1]}": write those '
            f"that are meant to a file of their own; {AS_BYTES}."
        )
    if names:
        return content[names[0]]
    rows = _of_table(content)
    if rows is not None:
        return rows
    return [content] if names_record(content) else None


def _of_table(content: dict[str, Any]) -> list[Any] | None:
    """Returns the rows of a table that was written as one object; None where it is no such table.

    Sources: pandas.DataFrame.to_json with its `orient` "columns" (the default), "index" or "split",
    and the answers of Hugging Face's server of data sets.
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
    """Tells whether a value is a list with items of a kind, and no others."""
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


def is_one_list(path: Path, encoding: str | None) -> bool:
    """Tells whether a file that should have a record on each line is one list of them.

    A list may stand on a line, too: a conversation, or what was put there by mistake. Such a line
    is JSON by itself, and others follow.
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
    """Yields the lines that are not blank, without the blanks at their ends."""
    return filter(None, map(bytes.strip, TextFile(path, encoding).lines()))


def refuse_lines_of_records(path: Path, encoding: str | None) -> None:
    """Refuses a text whose first line is a record, or a list of them: its name promises prose.

    Raises:
        ValueError: the file holds records.
    """
    head = next(TextFile(path, encoding).chunks(), b"")
    # The first character excludes most files before a line, perhaps all of a file, is read.
    if not head.lstrip().startswith((b"{", b"[")):
        return
    first = next(_filled_lines(path, encoding), b"")
    try:
        value = decode_json(first, allow_nan=False)
    except ValueError:
        return
    if is_record(value) or names_record(value) or _are_records(value):
        raise ValueError(
            f"documents: `{path}` holds records as lines of JSON, and its name says that it is "
            f"plain text: call it {path.stem}.jsonl; {AS_BYTES}."
        )
