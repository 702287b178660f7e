"""Documents from files, folders and texts that every CPython carries. Level 3."""

import dataclasses
import json
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from .conversations import document_of
from .documents import Document, Piece

_SKIPPED_FOLDERS = frozenset(
    "site-packages test tests idle_test encodings pydoc_data lib2to3 __pycache__".split()
)
ON_BAD = ("error", "skip")
Parsed = TypeVar("Parsed")


def _stdlib() -> Iterator[bytes]:
    """The standard library's own sources of 2 to 200 kB, one document a file, by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        paths = (Path(folder) / name for name in files if name.endswith(".py"))
        found += [p for p in paths if 2_000 <= p.stat().st_size <= 200_000]
    for path in sorted(found, key=lambda p: p.relative_to(root).as_posix()):
        yield path.read_bytes()


def _topics() -> Iterator[bytes]:
    """The reference documentation that `help()` shows, one document a topic."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].encode()


def _capitals() -> Iterator[bytes]:
    """The same in capitals."""
    for text in _topics():
        yield text.decode().upper().encode()


def _charmaps() -> Iterator[bytes]:
    """The code pages' tables: one character a line, its number and its Unicode name."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "encodings"
    for path in sorted(folder.glob("*.py")):
        if b"decoding_table = (" in (text := path.read_bytes()):
            yield text


def _headers() -> Iterator[bytes]:
    """CPython's own C headers, one document a file."""
    folder = Path(sysconfig.get_paths()["include"])
    found = sorted(folder.rglob("*.h"))
    if not found:
        raise ValueError(f"documents: this Python has no C headers in `{folder}` (python3-dev).")
    for path in found:
        yield path.read_bytes()


BUILT_IN: dict[str, Callable[[], Iterator[bytes]]] = {
    "stdlib": _stdlib,
    "pydoc-topics": _topics,
    "topics-capitals": _capitals,
    "charmaps": _charmaps,
    "c-headers": _headers,
}


@dataclasses.dataclass
class Reading:
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
    reading: Reading | None = None,
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
    reading = reading or Reading()
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


def _files(source: str | Path) -> list[Path]:
    """The files of a path, or a ValueError that names what is not there."""
    path = Path(source)
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    if not path.exists():
        raise ValueError(
            f"documents: `{source}` is no file, no folder and none of {', '.join(BUILT_IN)}."
        )
    return [path]


def size_of(source: str | Path) -> int:
    """Bytes of the files of a source; 0 of a built-in text.

    Raises:
        ValueError: nothing of that name.
    """
    if source in BUILT_IN:
        return 0
    return sum(path.stat().st_size for path in _files(source))


def documents(
    source: str | Path, *, on_bad: str = "error", reading: Reading | None = None
) -> Iterator[Document]:
    """The documents of `source`, one after the other; no more than one is held at a time.

    Args:
        source: a `.jsonl` file (see `conversations` for what a line may be), any other file (one
            document, whatever its bytes), a folder (every file below it, by path), or a name of
            `BUILT_IN`.
        on_bad: what to do with a bad line of a .jsonl file: "error", or "skip".
        reading: counts what is read and skipped; without it, one warning says what was skipped.

    Raises:
        ValueError: nothing of that name, or a bad line, as `file:line: reason`.
    """
    if on_bad not in ON_BAD:
        raise ValueError(f"documents: `on_bad` must be error or skip; got {on_bad!r}.")
    if source in BUILT_IN:
        yield from (Document((Piece(text),)) for text in BUILT_IN[source]())
        return
    told, reading = reading is not None, reading or Reading()
    for path in _files(source):
        if path.suffix == ".jsonl":
            yield from json_lines(path, document_of, on_bad=on_bad, reading=reading)
            continue
        yield Document((Piece(path),))
        reading.bytes += path.stat().st_size
    if reading.skipped and not told:
        left = f"{reading.skipped} lines of {source} were skipped"
        warnings.warn(f"{left}; the first: {reading.first}", stacklevel=2)
