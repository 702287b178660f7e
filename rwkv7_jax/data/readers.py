"""Documents from files, folders and texts that every CPython carries."""

import warnings
from collections.abc import Iterator
from pathlib import Path

from rwkv7_jax.data.builtin_corpora import BUILT_IN
from rwkv7_jax.data.documents import Document, Segment
from rwkv7_jax.data.jsonl import ReadStats, json_lines, parse_record

ON_BAD = ("error", "skip")


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
    source: str | Path, *, on_bad: str = "error", reading: ReadStats | None = None
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
        yield from (Document((Segment(text),)) for text in BUILT_IN[source]())
        return
    told, reading = reading is not None, reading or ReadStats()
    for path in _files(source):
        if path.suffix == ".jsonl":
            yield from json_lines(path, parse_record, on_bad=on_bad, reading=reading)
            continue
        yield Document((Segment(path),))
        reading.bytes += path.stat().st_size
    if reading.skipped and not told:
        left = f"{reading.skipped} lines of {source} were skipped"
        warnings.warn(f"{left}; the first: {reading.first}", stacklevel=2)
