"""Documents, as bytes, from files, folders and texts that every CPython carries. Level 2."""

import json
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

_SKIPPED_FOLDERS = frozenset(
    "site-packages test tests idle_test encodings pydoc_data lib2to3 __pycache__".split()
)
ON_BAD = ("error", "skip")


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


def _json_text(line: bytes) -> bytes:
    """The text of one line of a .jsonl file, or a ValueError that says why there is none."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise ValueError("begins with a byte order mark")

    def refuse(name):
        raise ValueError(f"{name} is no JSON number")

    try:
        record = json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"not one JSON object: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict) or "text" not in record:
        raise ValueError('no object with a "text" key')
    if not isinstance(record["text"], str):
        raise ValueError(f'"text" is no string but {type(record["text"]).__name__}')
    try:
        return record["text"].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'"text" has a lone surrogate at character {error.start}') from None


def _jsonl(path: Path, on_bad: str) -> Iterator[bytes]:
    skipped, first = 0, ""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                document = _json_text(line)
            except ValueError as error:
                reason = f"{path}:{number}: {error}"
                if on_bad == "error":
                    raise ValueError(reason) from None
                skipped, first = skipped + 1, first or reason
                continue
            yield document
    if skipped:
        warnings.warn(f"{skipped} lines of {path} were skipped; the first: {first}", stacklevel=2)


def documents(source: str | Path, *, on_bad: str = "error") -> Iterator[bytes]:
    """The documents of `source`, one after the other.

    Args:
        source: a `.jsonl` file with one `{"text": ...}` a line, any other file (one document), a
            folder (every file below it, by path), or a name of `BUILT_IN`.
        on_bad: what to do with a bad line of a .jsonl file: "error", or "skip" with one warning.

    Raises:
        ValueError: nothing of that name, or a bad line, as `file:line: reason`.
    """
    if on_bad not in ON_BAD:
        raise ValueError(f"documents: `on_bad` must be error or skip; got {on_bad!r}.")
    if source in BUILT_IN:
        yield from BUILT_IN[source]()
        return
    path = Path(source)
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            yield from documents(file, on_bad=on_bad)
    elif path.suffix == ".jsonl" and path.exists():
        yield from _jsonl(path, on_bad)
    elif path.exists():
        yield path.read_bytes()
    else:
        raise ValueError(
            f"documents: `{source}` is no file, no folder and none of {', '.join(BUILT_IN)}."
        )
