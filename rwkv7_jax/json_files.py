"""Writes JSON files atomically, and reads JSON that may be damaged."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkv7_jax.atomic_write import atomic_write


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Atomically writes a value as JSON.

    Args:
        path: path of the file.
        value: JSON-compatible value.
        indent: spaces per level; None for one line.

    Raises:
        ValueError: the folder of `path` does not exist.
        OSError: the file cannot be written.
    """
    text = json.dumps(value, indent=indent)
    with atomic_write(path) as file:
        file.write(f"{text}\n".encode())


def parse_json(content: str | bytes) -> Any:
    """Parses JSON that another program wrote, or that may be damaged.

    Raises:
        ValueError: it is not JSON in UTF-8, or is nested too deeply; the message is only the
            reason.
    """
    # Some editors begin files with a byte order mark.
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Reads a JSON file; returns None if it is missing or damaged."""
    # Opening a pipe would block forever.
    if not path.is_file():
        return None
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def read_object(path: Path) -> dict[str, Any] | None:
    """Reads the object in a JSON file; returns None if it is missing or damaged."""
    value = read_json(path)
    return value if isinstance(value, dict) else None


def flat_items(
    fields: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yields the values of nested objects with their names, such as "data.length".

    An empty object is a value.
    """
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from flat_items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def number_of(value: Any) -> float | None:
    """Returns a JSON value as a float; None if it is not a number, or too large for a float.

    True and False are 1 and 0.
    """
    if not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
