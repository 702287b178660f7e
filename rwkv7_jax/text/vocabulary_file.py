"""Vocabulary files in World's format: each line is an id, a Python literal and a byte count."""

import ast
from collections.abc import Mapping, Sequence

# Most digits of an id or a size; far above those of any model.
_MOST_DIGITS = 10

# The errors that a damaged literal may raise.
_LITERAL_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


def parse_vocabulary(text: str) -> dict[int, bytes]:
    """Parses a vocabulary file.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/rwkv_vocab_v20230424.txt (the format).

    Raises:
        ValueError: a line is not an entry, its byte count is wrong, or it repeats the id or the
            bytes of another line.
    """
    numbers = []
    literals = []
    sizes = []
    # Not `splitlines`, which would also split at U+2028 and others inside literals.
    lines = [line.rstrip("\r") for line in text.split("\n")]
    lines = [line for line in lines if line]
    for row, line in enumerate(lines, 1):
        number, _, rest = line.partition(" ")
        literal, _, size = rest.rpartition(" ")
        for digits in (number, size):
            # Python cannot parse numbers with thousands of digits.
            if not digits.isdecimal() or len(digits) > _MOST_DIGITS:
                raise _no_entry(row, line)
        numbers.append(int(number))
        literals.append(literal)
        sizes.append(int(size))

    entries: dict[int, bytes] = {}
    rows_of_bytes: dict[bytes, int] = {}
    rows = zip(numbers, _evaluate(literals, lines), sizes, strict=True)
    for row, (number, value, size) in enumerate(rows, 1):
        entry = _as_bytes(value)
        if entry is None:
            raise _no_entry(row, lines[row - 1])
        if len(entry) != size:
            raise ValueError(
                f"parse_vocabulary: line {row} says {size} bytes; got {len(entry)}."
            )
        if number in entries:
            raise ValueError(f"parse_vocabulary: line {row} repeats the id {number}.")
        if entry and entry in rows_of_bytes:
            raise ValueError(
                f"parse_vocabulary: line {row} has the bytes of line {rows_of_bytes[entry]}."
            )
        entries[number] = entry
        rows_of_bytes[entry] = row
    return entries


def _evaluate(literals: Sequence[str], lines: Sequence[str]) -> list[object]:
    """Evaluates the literals of all lines."""
    try:
        # One literal for the whole list; 65529 separate calls would take seconds.
        values = ast.literal_eval("[" + ",".join(literals) + "]")
        if len(values) == len(literals):
            return values
    except _LITERAL_ERRORS:
        pass
    # A line is damaged or holds several values; evaluating them one by one finds it.
    values = []
    for row, (literal, line) in enumerate(zip(literals, lines, strict=True), 1):
        try:
            values.append(ast.literal_eval(literal))
        except _LITERAL_ERRORS:
            raise _no_entry(row, line) from None
    return values


def _as_bytes(value: object) -> bytes | None:
    """Returns the bytes of a literal; None if it is not text or has a lone surrogate."""
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:
            return None
    return value if isinstance(value, bytes) else None


def _no_entry(row: int, line: str) -> ValueError:
    return ValueError(f"parse_vocabulary: line {row} is not an entry: {line[:60]!r}.")


def format_vocabulary(entries: Mapping[int, bytes]) -> str:
    """Writes entries in the format of `parse_vocabulary`, by ascending id."""
    lines = [
        f"{number} {entries[number]!r} {len(entries[number])}"
        for number in sorted(entries)
    ]
    return "\n".join(lines) + "\n"
