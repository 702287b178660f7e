"""Text corpora that come with CPython."""

import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Installed packages, tests (which contain unusual encodings) and generated tables.
_SKIPPED_FOLDERS = frozenset(
    "site-packages test tests idle_test encodings pydoc_data lib2to3 __pycache__".split()
)

# Smallest and largest source file, in bytes, that becomes a document.
_SMALLEST = 2_000
_LARGEST = 200_000


def _stdlib() -> Iterator[bytes]:
    """Yields the sources of the standard library, one document per file, by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for folder, folders, files in os.walk(root):
        # Changed in place, because `os.walk` descends only into the folders left in the list.
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in files:
            path = Path(folder) / name
            if path.suffix == ".py" and _SMALLEST <= path.stat().st_size <= _LARGEST:
                sources.append(path)
    for path in sorted(sources, key=lambda path: path.relative_to(root).as_posix()):
        yield path.read_bytes()


def _topics() -> Iterator[bytes]:
    """Yields the reference documentation of `help()`, one document per topic."""
    # Imported on first use: it has half a megabyte, and some builds of Python lack it.
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].encode()


def _capitals() -> Iterator[bytes]:
    """Yields the same topics in capitals."""
    for text in _topics():
        yield text.decode().upper().encode()


def _charmaps() -> Iterator[bytes]:
    """Yields the code page tables, which list each character's code and Unicode name."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "encodings"
    for path in sorted(folder.glob("*.py")):
        text = path.read_bytes()
        if b"decoding_table = (" in text:
            yield text


def _headers() -> Iterator[bytes]:
    """Yields CPython's C headers, one document per file."""
    folder = Path(sysconfig.get_paths()["include"])
    headers = sorted(folder.rglob("*.h"))
    if not headers:
        raise ValueError(
            f"documents: this Python has no C headers in `{folder}` (python3-dev)."
        )
    for path in headers:
        yield path.read_bytes()


# The corpora by name; see `is_built_in`.
BUILT_IN: dict[str, Callable[[], Iterator[bytes]]] = {
    "stdlib": _stdlib,
    "pydoc-topics": _topics,
    "topics-capitals": _capitals,
    "charmaps": _charmaps,
    "c-headers": _headers,
}


def is_built_in(source: Any) -> bool:
    """Tells whether a source is the name of a built-in corpus."""
    return isinstance(source, str) and source in BUILT_IN
