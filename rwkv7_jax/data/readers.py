"""Documents from files, folders and the built-in corpora."""

import warnings
from collections.abc import Iterator
from pathlib import Path

from rwkv7_jax.data.builtin_corpora import BUILT_IN
from rwkv7_jax.data.choices import ON_BAD, check_choice
from rwkv7_jax.data.documents import Document, Segment
from rwkv7_jax.data.jsonl import ReadStats, parse_record, read_jsonl


def _files(source: str | Path) -> list[Path]:
    """Lists the files of a path, or raises ValueError if there is nothing of that name."""
    path = Path(source)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if not path.exists():
        raise ValueError(
            f"documents: `{source}` is no file, no folder and none of {', '.join(BUILT_IN)}."
        )
    return [path]


def size_of(source: str | Path) -> int:
    """Counts the bytes of the files of a source; 0 for a built-in corpus.

    Raises:
        ValueError: nothing of that name.
    """
    if source in BUILT_IN:
        return 0
    return sum(file.stat().st_size for file in _files(source))


def documents(
    source: str | Path, *, on_bad: str = "error", stats: ReadStats | None = None
) -> Iterator[Document]:
    """Yields the documents of `source`; no more than one is in memory at a time.

    Args:
        source: a `.jsonl` file (`jsonl` says what a line may be), any other file (one document,
            whatever its bytes), a folder (every file below it, by path), or a name of `BUILT_IN`.
        on_bad: what to do with a bad line of a .jsonl file: "error", or "skip".
        stats: counts what is read and skipped; without it, one warning says what was skipped.

    Raises:
        ValueError: nothing of that name, or a bad line, as `file:line: reason`.
    """
    check_choice(
        on_bad,
        ON_BAD,
        argument="on_bad",
        caller="documents",
    )
    if source in BUILT_IN:
        for text in BUILT_IN[str(source)]():
            yield Document((Segment(text),))
        return
    counted = stats if stats is not None else ReadStats()
    for file in _files(source):
        if file.suffix == ".jsonl":
            yield from read_jsonl(
                file,
                parse_record,
                on_bad=on_bad,
                stats=counted,
            )
            continue
        yield Document((Segment(file),))
        counted.bytes += file.stat().st_size
    if stats is None:
        warn_of_skipped(source, counted, stacklevel=3)


def warn_of_skipped(
    source: str | Path,
    stats: ReadStats,
    *,
    stacklevel: int,
) -> None:
    """Warns once about all lines of a source that were skipped, if there are any."""
    if stats.skipped:
        warnings.warn(
            f"{stats.skipped} lines of {source} were skipped; the first: {stats.first_error}",
            stacklevel=stacklevel,
        )
