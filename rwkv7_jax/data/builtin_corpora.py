"""Texts that every CPython installation carries, as corpora."""

import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

_SKIPPED_FOLDERS = frozenset(
    "site-packages test tests idle_test encodings pydoc_data lib2to3 __pycache__".split()
)


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
