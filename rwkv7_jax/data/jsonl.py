"""The reader of JSON Lines files, with one JSON value per line."""

import dataclasses
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rwkv7_jax.checks import check_choice, prefix_errors
from rwkv7_jax.data.choices import ON_BAD
from rwkv7_jax.data.records.fields import check_object
from rwkv7_jax.data.text_files import TextFile
from rwkv7_jax.local_paths import local_path

_ENCODINGS = "`encoding` reads other texts, such as latin-1 or utf-16"

Parsed = TypeVar("Parsed")


@dataclasses.dataclass
class ReadStats:
    """Progress of reading, updated while documents are read.

    Attributes:
        bytes: number of bytes read so far.
        skipped: number of skipped lines.
        first_error: reason for the first skipped line, as `file:line: reason`.
        passed_over: number of ignored files in a folder.
    """

    bytes: int = 0
    skipped: int = 0
    first_error: str = ""
    passed_over: int = 0

    def report(self, reason: str, on_bad: str) -> None:
        """Raises for a bad line or record, or counts it as skipped.

        Raises:
            ValueError: `on_bad` is "error".
        """
        if on_bad == "error":
            raise ValueError(reason) from None
        self.skipped += 1
        self.first_error = self.first_error or reason


def read_jsonl(
    path: str | Path,
    parse: Callable[[Any], Parsed],
    *,
    on_bad: str = "error",
    drop_torn_end: bool = False,
    allow_nan: bool = False,
    stats: ReadStats | None = None,
    encoding: str | None = None,
) -> Iterator[Parsed]:
    """Yields `parse(record)` for the record on every line; skips blank lines.

    Args:
        path: path of a .jsonl file, which may be compressed.
        parse: parses a record; raises ValueError with a reason for an invalid one.
        on_bad: "error", or "skip" for lines that are not JSON or cannot be parsed.
        drop_torn_end: drop an incomplete last line, as a killed writer leaves it, with a warning.
        allow_nan: accept NaN and infinities as numbers, which data must not hold.
        stats: counts the bytes read and the lines skipped.
        encoding: encoding of the text; None for UTF-8.

    Raises:
        TypeError: `path` is not a path.
        ValueError: a line is bad; the message is `file:line: reason`.
    """
    with prefix_errors("read_jsonl"):
        path = local_path(path, "`path`")
        check_choice(on_bad, ON_BAD, "`on_bad`")
    stats = stats or ReadStats()
    # Lines are split as bytes, so a separator such as U+2028 inside a string does not end a line.
    for number, line in enumerate(TextFile(path, encoding).lines(), 1):
        stats.bytes += len(line)
        if not line.strip():
            continue
        try:
            record = decode_json(line, allow_nan=allow_nan, on_repeat=_refuse_repeat)
        except ValueError as error:
            breaks_off = not line.endswith(b"\n")
            if drop_torn_end and breaks_off:
                warnings.warn(
                    f"{path}:{number}: dropped; the line breaks off.", stacklevel=3
                )
                return
            end = "; the file ends inside this line" if breaks_off else ""
            stats.report(f"{path}:{number}: {error}{end}", on_bad)
            continue
        try:
            parsed = parse(record)
        except ValueError as error:
            stats.report(f"{path}:{number}: {error}", on_bad)
            continue
        yield parsed


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Reads the objects of an append-only log; empty if the file is missing.

    A killed process may leave an incomplete line, which the next one is appended to, so lines that
    are not objects are skipped.
    """
    return list(iterate_log(local_path(path, "read_log: `path`")))


def iterate_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a log one at a time, for one that memory need not hold.

    Args:
        path: as of `read_log`.
    """
    if path.is_file():
        yield from read_jsonl(path, check_object, on_bad="skip", allow_nan=True)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_repeat(key: str) -> None:
    raise ValueError(f'"{key[:40]}" twice in one object')


def decode_json(
    line: bytes,
    *,
    allow_nan: bool,
    on_repeat: Callable[[str], Any] | None = None,
) -> Any:
    """Decodes a line.

    Args:
        line: the line.
        allow_nan: accept NaN and infinities as numbers.
        on_repeat: called with a key that an object has twice, of which only the last value is kept.

    Raises:
        ValueError: the line is not JSON in UTF-8; the message is only the reason.
    """
    if b"\0" in line[:4]:
        raise ValueError(f"begins with zero bytes, as UTF-16 does; {_ENCODINGS}")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}; {_ENCODINGS}") from None
    if text.startswith("\ufeff"):
        raise ValueError("begins with a byte order mark")
    try:
        return json.loads(
            text,
            parse_constant=None if allow_nan else _refuse_constant,
            object_pairs_hook=_object_builder(on_repeat),
        )
    except json.JSONDecodeError as error:
        # Some messages already end in "at".
        reason = error.msg.removesuffix(" at")
        raise ValueError(
            f"not one JSON object: {reason} at column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object_builder(
    on_repeat: Callable[[str], Any] | None,
) -> Callable[[list[tuple[str, Any]]], dict[str, Any]] | None:
    """Returns a function that builds an object from its pairs.

    None stands for the one of Python, which is faster.
    """
    if on_repeat is None:
        return None

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            ((repeated, _),) = counts.most_common(1)
            on_repeat(repeated)
        return fields

    return build
