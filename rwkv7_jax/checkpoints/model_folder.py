"""Folders that hold one model: their JSON file, and how one folder replaces another."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
        ValueError: the file is not JSON, or holds no object.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"load_model: `{path}` is not JSON.") from None
    if not isinstance(table, dict):
        raise ValueError(f"load_model: `{path}` holds no JSON object.")
    return table


def replace_folder(
    path: Path, expected: set[str], fill: Callable[[Path], None]
) -> None:
    """Writes a folder completely, or leaves what was there before.

    Args:
        path: absolute.
        expected: names that the folder may hold now; with any other file in it, it is not replaced.
        fill: called with a folder that does not exist yet; it makes and fills it.

    Raises:
        ValueError: the folder at `path` holds other files.
    """
    if path.exists():
        _refuse_other_files(path, expected)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Next to the target: a rename is atomic only within one file system.
    workspace = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    new = workspace / "new"
    old = workspace / "old"
    try:
        fill(new)
        # Two renames, so that there is no moment in which only half a folder is left.
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(workspace, ignore_errors=True)


def _refuse_other_files(path: Path, expected: set[str]) -> None:
    """Raises if a folder holds anything but a model: it may be somebody's work."""
    present = {entry.name for entry in path.iterdir()}
    others = sorted(present - expected)
    if others:
        raise ValueError(
            f"save_model: `{path}` holds other files, {others[0]} for one; "
            "give an empty or a new folder."
        )
