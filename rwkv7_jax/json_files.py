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


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds; None where there is none, or a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_object(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file; None where there is none, or a damaged one."""
    value = read_json(path)
    return value if isinstance(value, dict) else None
