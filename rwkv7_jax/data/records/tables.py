"""Tables whose rows are records: .csv, .tsv and .parquet."""

import contextlib
import csv
import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv7_jax.data.documents import Document
from rwkv7_jax.data.jsonl import ReadStats
from rwkv7_jax.data.records.fields import without_nulls
from rwkv7_jax.data.records.record import names_record, parse_record
from rwkv7_jax.data.text_files import TextFile, check_content, check_is_text, head_of

# The separator by suffix, and the alternatives if the first line does not contain it: spreadsheets
# write semicolons in locales with a decimal comma.
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_OTHER_SEPARATORS = ("\t", ";", "|", ",")

_PARQUET = ".parquet"

_PARQUET_MAGIC = b"PAR1"

_PARQUET_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    OSError,
    NotImplementedError,
)

# Suffixes of tables.
TABLES = (*_SEPARATORS, _PARQUET)

# A row of a table: its position, for error messages, and its cells by column name.
_Row = tuple[str, dict[str, Any]]


def check_table(path: Path, encoding: str | None) -> None:
    """Checks that a file is not something else in place of a table.

    Raises:
        ValueError: the file is a web page, a pointer or another known format; see `text_files`.
    """
    if head_of(path).startswith(_PARQUET_MAGIC):
        if path.suffix.lower() != _PARQUET:
            raise ValueError(
                f"documents: `{path}` is a Parquet table: rename it to .parquet."
            )
        return
    if path.suffix.lower() == _PARQUET:
        check_content(path)
    else:
        check_is_text(path, encoding=encoding)


def table_documents(
    path: Path,
    suffix: str,
    *,
    encoding: str | None,
    on_bad: str,
    stats: ReadStats,
) -> Iterator[Document]:
    """Yields a document for each row of a table, whose columns are the keys of a record.

    Args:
        path: path of the file; text files may be compressed.
        suffix: one of `TABLES`.
        encoding: encoding of a text file; None for UTF-8.
        on_bad: "error" or "skip", for rows that are not records.
        stats: counts the bytes read and the rows skipped.

    Raises:
        ValueError: the file is damaged, a row is bad, or pyarrow is missing for Parquet.
    """
    if suffix == _PARQUET:
        rows = _parquet_rows(path)
    else:
        separator = _separator(path, suffix, encoding)
        lines = csv.reader(_lines(path, encoding), delimiter=separator, strict=True)
        rows = _csv_rows(path, lines, on_bad=on_bad, stats=stats)
    for place, row in rows:
        # An empty cell counts as a missing key.
        record = {key: cell for key, cell in row.items() if cell not in (None, "")}
        # In Parquet, a missing text is null, so an empty one is a document, as in lines of JSON.
        is_text = suffix == _PARQUET and row.get("text") == ""
        if is_text and not names_record(record):
            record["text"] = ""
        try:
            document = parse_record(record)
        except ValueError as error:
            stats.report(f"{place}: {error}", on_bad)
            continue
        yield document
    stats.bytes += path.stat().st_size


def _separator(path: Path, suffix: str, encoding: str | None) -> str:
    """Detects the separator of a file from its first line."""
    expected = _SEPARATORS[suffix]
    first = next(filter(str.strip, _lines(path, encoding)), "")
    if expected in first:
        return expected
    # A table of one column has no separator at all.
    return next((other for other in _OTHER_SEPARATORS if other in first), expected)


def _csv_rows(
    path: Path, reader: Any, *, on_bad: str, stats: ReadStats
) -> Iterator[_Row]:
    """Yields the rows of a file whose first line names the columns; skips blank lines."""
    # The module's default limit of 128 KiB per cell is too small for texts.
    csv.field_size_limit(2**31 - 1)
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            place = f"{path}:{line}"
            # A cell may span several lines.
            line = reader.line_num + 1
            if not cells:
                continue
            if not names:
                names = _column_names(cells, place)
                continue
            if len(cells) != len(names):
                reason = f"{len(cells)} cells, but the first line names {len(names)}"
                stats.report(f"{place}: {reason} columns", on_bad)
                continue
            yield place, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{path}:{line}: not a row of a table: {error}; `as_bytes` reads the file as plain text"
        ) from None


def _column_names(cells: list[str], place: str) -> list[str]:
    """Checks the names of columns."""
    names = [name.strip() for name in cells]
    # Counted in one pass, because a text with a table's suffix may have any number of separators.
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f'{place}: names two columns "{name}"')
    return names


def _lines(path: Path, encoding: str | None) -> Iterator[str]:
    """Yields the lines of a file with their line ends, as the csv module requires."""
    for number, line in enumerate(TextFile(path, encoding).lines(), 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not UTF-8 at byte {error.start}; `encoding` reads other texts, "
                "such as latin-1"
            ) from None


def _without_fillers(value: Any) -> Any:
    """Removes the nulls of objects at every depth; keeps those of lists.

    Objects in a Parquet file have all keys, so a missing key is a null.
    """
    if isinstance(value, dict):
        return {
            key: _without_fillers(item) for key, item in without_nulls(value).items()
        }
    if isinstance(value, list):
        return [_without_fillers(item) for item in value]
    return value


def _parquet_rows(path: Path) -> Iterator[_Row]:
    """Yields the rows of a Parquet file, with about a thousand in memory at a time."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(
            f"documents: `{path}` is a Parquet table, which pyarrow reads: "
            "`pip install 'rwkv7_jax[parquet]'`."
        ) from None
    with _parquet_errors(path):
        names = parquet.read_schema(path).names
    # A row would hold only the last of two columns of one name.
    _column_names(names, str(path))
    number = 0
    with _parquet_errors(path), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", _without_fillers(row)


@contextlib.contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """Turns the errors of pyarrow into one sentence.

    Raises:
        ValueError: the block raised such an error.
    """
    try:
        yield
    # The errors of pyarrow are of these types, too. A date that Python cannot represent raises
    # OverflowError, and an unknown time zone a LookupError.
    except _PARQUET_ERRORS as error:
        reason = " ".join(str(error).split()).rstrip(".")[:160]
        raise ValueError(
            f"documents: `{path}` is not a Parquet table, or is damaged or truncated: {reason}."
        ) from None
