"""Corpora that every CPython installation carries."""

import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

# Installed packages, tests (which embed odd encodings) and generated tables are no prose.
_SKIPPED_FOLDERS = frozenset(
    "site-packages test tests idle_test encodings pydoc_data lib2to3 __pycache__".split()
)

# Bytes of the smallest and the largest source file that is a document.
_SMALLEST = 2_000
_LARGEST = 200_000


def _stdlib() -> Iterator[bytes]:
    """Yields the standard library's own sources, one document a file, by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for folder, folders, files in os.walk(root):
        # Changed in place: `os.walk` descends only into the folders that the list still has.
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in files:
            path = Path(folder) / name
            if path.suffix == ".py" and _SMALLEST <= path.stat().st_size <= _LARGEST:
                sources.append(path)
    for path in sorted(sources, key=lambda path: path.relative_to(root).as_posix()):
        yield path.read_bytes()


def _topics() -> Iterator[bytes]:
    """Yields the reference documentation that `help()` shows, one document a topic."""
    # Half a megabyte of text, and missing in some builds of Python: imported only when it is read.
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].encode()


def _capitals() -> Iterator[bytes]:
    """Yields the same topics in capitals."""
    for text in _topics():
        yield text.decode().upper().encode()


def _charmaps() -> Iterator[bytes]:
    """Yields the code pages' tables: one character a line, its number and its Unicode name."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "encodings"
    for path in sorted(folder.glob("*.py")):
        text = path.read_bytes()
        if b"decoding_table = (" in text:
            yield text


def _headers() -> Iterator[bytes]:
    """Yields CPython's own C headers, one document a file."""
    folder = Path(sysconfig.get_paths()["include"])
    headers = sorted(folder.rglob("*.h"))
    if not headers:
        raise ValueError(
            f"documents: this Python has no C headers in `{folder}` (python3-dev)."
        )
    for path in headers:
        yield path.read_bytes()


BUILT_IN: dict[str, Callable[[], Iterator[bytes]]] = {
    "stdlib": _stdlib,
    "pydoc-topics": _topics,
    "topics-capitals": _capitals,
    "charmaps": _charmaps,
    "c-headers": _headers,
}
