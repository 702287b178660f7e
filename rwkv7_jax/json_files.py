"""JSON files that are written completely or not at all, and read where they may be damaged."""

import json
from pathlib import Path
from typing import Any

from rwkv7_jax.atomic_write import atomic_write


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Writes a value as JSON, completely, or leaves what was there before.

    Args:
        path: of the file.
        value: fit for JSON.
        indent: spaces for each level; None for one line.

    Raises:
        ValueError: the folder of `path` does not exist.
        OSError: the file cannot be written.
    """
    text = json.dumps(value, indent=indent)
    with atomic_write(path) as file:
        file.write(f"{text}\n".encode())


def parse_json(content: str | bytes) -> Any:
    """Returns the value that JSON of another program, or damaged JSON, describes.

    Raises:
        ValueError: it is no JSON in UTF-8, or is nested so deeply that it cannot be read; the
            message is the reason alone.
    """
    # Editors on Windows begin files with a byte order mark.
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds; None where there is none, or a damaged one."""
    # Opening a pipe would wait for ever.
    if not path.is_file():
        return None
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def read_object(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file; None where there is none, or a damaged one."""
    value = read_json(path)
    return value if isinstance(value, dict) else None


def number_of(value: Any) -> float | None:
    """Returns a value of JSON as a float; None where it is no number, or too large for one.

    True and False are 1 and 0.
    """
    if not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
