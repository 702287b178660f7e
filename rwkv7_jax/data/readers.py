"""Readers of documents from files, folders and the built-in corpora."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from rwkv7_jax.checks import check_choice, prefix_errors
from rwkv7_jax.data.builtin_corpora import BUILT_IN, is_built_in
from rwkv7_jax.data.choices import ON_BAD
from rwkv7_jax.data.documents import Document, Segment
from rwkv7_jax.data.jsonl import ReadStats, read_jsonl
from rwkv7_jax.data.records.json_files import (
    LINES,
    is_one_list,
    json_records,
    parse_json_records,
    refuse_lines_of_records,
)
from rwkv7_jax.data.records.record import parse_record
from rwkv7_jax.data.records.tables import TABLES, check_table, table_documents
from rwkv7_jax.data.text_files import (
    AS_BYTES,
    TextFile,
    check_content,
    check_encoding,
    check_is_text,
    head_of,
    inner_suffix,
    is_compressed,
)
from rwkv7_jax.local_paths import local_path, refuse_hub_name

# Non-hidden files of operating systems, editors and version control systems.
_CLUTTER_NAMES = frozenset({"thumbs.db", "desktop.ini", "__pycache__", "__macosx"})

_CLUTTER_SUFFIXES = frozenset(
    ".png .jpg .jpeg .gif .webp .bmp .ico .tif .tiff .heic .swp .swo .pyc .bak .orig".split()
)


# Hugging Face's description of a data set, which begins with a table in YAML.
_CARD = "README.md"
_CARD_START = (b"---\n", b"---\r\n")

# The table of a data set's columns that older versions of Hugging Face's `datasets` wrote.
_COLUMNS = "dataset_infos.json"


def _is_card(file: Path) -> bool:
    """Returns whether a file describes the data set next to it."""
    if file.name == _CARD:
        return head_of(file).startswith(_CARD_START)
    return file.name == _COLUMNS


def _is_clutter(relative: Path) -> bool:
    """Returns whether a file below a data folder is not data."""
    for part in relative.parts:
        if part.startswith(".") or part.lower() in _CLUTTER_NAMES:
            return True
    name = relative.name
    is_edited = name.endswith("~") or (name.startswith("#") and name.endswith("#"))
    return is_edited or relative.suffix.lower() in _CLUTTER_SUFFIXES


def _files_below(folder: Path) -> list[Path]:
    """Lists all files below a folder, sorted by path; follows links to folders.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    files = []
    visited = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        identity = _identity(Path(place))
        if identity in visited:
            # A link to a parent folder, or a second link to the same folder.
            folders.clear()
            continue
        visited.add(identity)
        # Sorted, so that the first of two links is followed regardless of the file system's order.
        folders.sort()
        files += [Path(place) / name for name in names]
    return sorted(files)


def _without_second_links(files: list[Path]) -> list[Path]:
    """Removes links to other files of a list, which would be read twice."""
    links = {file for file in files if file.is_symlink()}
    if not links:
        return files
    targets = {_identity(file) for file in files if file not in links}
    return [
        file for file in files if file not in links or _identity(file) not in targets
    ]


def _identity(file: Path) -> tuple[int, int]:
    """Returns device and inode of a file or folder."""
    status = file.stat()
    return status.st_dev, status.st_ino


def _files(source: str | Path) -> tuple[list[Path], int]:
    """Lists the files of a path, and counts the ignored files of a folder.

    Raises:
        ValueError: the path does not exist.
    """
    path = local_path(source, "documents: `source`")
    if path.is_dir():
        everything = _files_below(path)
        files = []
        for file in everything:
            # A link may be broken, for example to data that was not fetched yet.
            if not file.is_file() or _is_clutter(file.relative_to(path)):
                continue
            if not _is_card(file):
                files.append(file)
        files = _without_second_links(files)
        return files, len(everything) - len(files)
    if not path.exists():
        refuse_hub_name(source, "documents: `source`", kind="dataset")
        if any(character in str(source) for character in "*?["):
            raise ValueError(
                f"documents: `{source}` does not exist, and patterns are not expanded: name the "
                "folder, or comma-separated files."
            )
        raise ValueError(
            f"documents: `{source}` must be a file, a folder or one of {', '.join(BUILT_IN)}; "
            "it does not exist."
        )
    if not path.is_file():
        raise ValueError(f"documents: `{source}` must be a file or a folder.")
    return [path], 0


def size_of(source: str | Path) -> int:
    """Counts the bytes of the files of a source; built-in corpora and compressed files count as 0.

    Raises:
        ValueError: the path does not exist.
    """
    if is_built_in(source):
        return 0
    total = 0
    for file in _files(source)[0]:
        # The text size of a compressed file is unknown before reading it.
        if not is_compressed(file):
            total += file.stat().st_size
    return total


def documents(
    source: str | Path,
    *,
    on_bad: str = "error",
    stats: ReadStats | None = None,
    as_bytes: bool = False,
    encoding: str | None = None,
) -> Iterator[Document]:
    """Yields the documents of `source`, with at most one in memory at a time.

    A source is one of these; files may be compressed with gzip, bzip2, xz or Zstandard:

    * a `.jsonl` file, a `.json` file or a table of records (see `records.record`)
    * any other text file, which is one document
    * a folder: every file below it, by path, except hidden files, pictures, editor leftovers,
      Hugging Face's data cards, and links that are broken or lead to other files of the folder
    * a name in `BUILT_IN`

    Args:
        source: path or name of the source.
        on_bad: "error" or "skip", for a bad line of a .jsonl file.
        stats: counts what is read and skipped; without it, warnings report skipped lines.
        as_bytes: read files that are not text or not UTF-8, and `.json` files, as bytes.
        encoding: encoding of the text, such as "utf-16" or "gbk"; None for UTF-8.

    Raises:
        ValueError: the path does not exist, a file is not text (the message says what it is) or
            not in its encoding, or a line is bad (`file:line: reason`).
    """
    with prefix_errors("documents"):
        check_choice(on_bad, ON_BAD, "`on_bad`")
        check_encoding(encoding, "`encoding`")
    if is_built_in(source):
        for text in BUILT_IN[str(source)]():
            yield Document((Segment(text),))
        return
    counted = stats if stats is not None else ReadStats()
    files, ignored = _files(source)
    counted.passed_over += ignored
    # Empty files are normal in a code folder; an empty file named directly is a failed download.
    is_folder = local_path(source, "documents: `source`").is_dir()
    for file in files:
        if not is_folder and _is_empty(file, as_bytes):
            raise ValueError(
                f"documents: `{source}` is an empty file: was its download interrupted?"
            )
        yield from _documents_of(
            file,
            on_bad=on_bad,
            stats=counted,
            as_bytes=as_bytes,
            encoding=encoding,
            is_named=not is_folder,
        )
    if stats is None:
        warn_of_skipped(source, counted, stacklevel=3)


def _is_empty(file: Path, as_bytes: bool) -> bool:
    """Returns whether a file or its decompressed content is empty."""
    if file.stat().st_size == 0:
        return True
    return not as_bytes and not any(TextFile(file).chunks())


def _documents_of(
    file: Path,
    *,
    on_bad: str,
    stats: ReadStats,
    as_bytes: bool,
    encoding: str | None,
    is_named: bool,
) -> Iterator[Document]:
    """Yields the documents of one file, which was named directly or is in a folder."""
    suffix = inner_suffix(file)
    if suffix in LINES and _holds_lines(file, as_bytes=as_bytes, encoding=encoding):
        yield from _lines(file, on_bad=on_bad, stats=stats, encoding=encoding)
    elif as_bytes:
        yield from _one_document(file, Segment(file), stats)
    elif suffix in TABLES:
        check_table(file, encoding)
        yield from table_documents(
            file,
            suffix,
            encoding=encoding,
            on_bad=on_bad,
            stats=stats,
        )
    else:
        yield from _records_or_text(
            file, on_bad=on_bad, stats=stats, encoding=encoding, is_named=is_named
        )


def _holds_lines(file: Path, *, as_bytes: bool, encoding: str | None) -> bool:
    """Returns whether a file with a JSON Lines suffix holds lines rather than one list."""
    if not as_bytes:
        check_content(file)
    return not is_one_list(file, encoding)


def _lines(
    file: Path, *, on_bad: str, stats: ReadStats, encoding: str | None
) -> Iterator[Document]:
    """Yields the records on the lines of a file as documents."""
    return read_jsonl(file, parse_record, on_bad=on_bad, stats=stats, encoding=encoding)


def _records_or_text(
    file: Path,
    *,
    on_bad: str,
    stats: ReadStats,
    encoding: str | None,
    is_named: bool,
) -> Iterator[Document]:
    """Yields the records of a JSON file, or any other file as one text."""
    wrong = check_is_text(file, encoding=encoding)
    if wrong is not None:
        raise ValueError(
            f"documents: `{file}` is not UTF-8 at byte {wrong:,}: name its encoding, such as "
            "`--config.data.encoding=gbk` (`encoding`, or `--encoding gbk` of `rwkv7 data`); "
            f"{AS_BYTES}."
        )
    suffix = inner_suffix(file)
    if suffix in (".json", *LINES):
        # A code folder may have JSON files with comments or of other dialects.
        must_hold = is_named or suffix in LINES
        records = json_records(file, encoding=encoding, must_hold=must_hold)
        if records is not None:
            stats.bytes += file.stat().st_size
            yield from parse_json_records(file, records, on_bad=on_bad, stats=stats)
            return
    if suffix in LINES:
        # Never read as text: anything that is not a record is a bad line.
        yield from _lines(file, on_bad=on_bad, stats=stats, encoding=encoding)
        return
    if suffix in ("", ".txt"):
        refuse_lines_of_records(file, encoding)
    yield from _one_document(file, Segment(TextFile(file, encoding)), stats)


def _one_document(file: Path, text: Segment, stats: ReadStats) -> Iterator[Document]:
    """Yields a file as one document and counts its bytes after that was read."""
    yield Document((text,))
    # Progress counts the bytes on disk.
    stats.bytes += file.stat().st_size


def warn_of_skipped(
    source: str | Path,
    stats: ReadStats,
    *,
    stacklevel: int,
) -> None:
    """Warns once each about the skipped lines and the ignored files of a source, if any."""
    if stats.skipped:
        warnings.warn(
            f"{stats.skipped} lines of {source} were skipped; the first: {stats.first_error}",
            stacklevel=stacklevel,
        )
    if stats.passed_over:
        warnings.warn(
            f"{stats.passed_over} files below {source} were ignored: hidden files, pictures, "
            "editor leftovers, data cards, broken links or links to other files of the folder",
            stacklevel=stacklevel,
        )
