"""Folders that hold one model: their JSON file, and how one folder replaces another."""

import contextlib
import ctypes
import functools
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rwkv7_jax.json_files import parse_json
from rwkv7_jax.local_paths import existing_path, is_special, local_path

# What a folder is called while another takes its place.
_OLD = "old"

# Linux's flag for two paths that exchange what they name, and the folder that paths begin at.
_RENAME_EXCHANGE = 2

_AT_FDCWD = -100

# macOS's flag of the same meaning.
_RENAME_SWAP = 2


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
        ValueError: the file is not JSON, or holds no object; or it is a device or a pipe.
    """
    if is_special(path):
        raise ValueError(f"`{path}` must be a file; it is a device or a pipe.")
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"`{path}` is empty; it must hold a JSON object.")
    try:
        table = parse_json(content)
    except ValueError as error:
        raise ValueError(f"`{path}` is not JSON, or was cut: {error}.") from None
    if not isinstance(table, dict):
        kind = type(table).__name__
        raise ValueError(f"`{path}` must hold a JSON object; got a {kind}.")
    return table


def replace_folder(
    path: Path,
    expected: set[str],
    fill: Callable[[Path], None],
) -> None:
    """Writes a folder completely, or leaves what was there before.

    Args:
        path: of the folder, which need not exist.
        expected: names that the folder may hold now; with any other file in it, it is not replaced.
        fill: called with a folder that does not exist yet; it makes and fills it.

    Raises:
        ValueError: the folder at `path` holds other files.
    """
    # A link stays one; the folder that it points to is replaced.
    path = Path(os.path.realpath(path))
    restore_interrupted(path)
    if path.exists():
        refuse_other_files(path, expected)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Next to the target: a rename is atomic only within one file system.
    workspace = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    new = workspace / "new"
    old = workspace / _OLD
    try:
        fill(new)
        if not path.exists():
            os.replace(new, path)
        elif not exchange_paths(new, path):
            # Two renames: a kill in between leaves both in the workspace; see below.
            os.replace(path, old)
            os.replace(new, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        run_to_end(functools.partial(shutil.rmtree, workspace, ignore_errors=True))


def run_to_end(function: Callable[[], None]) -> None:
    """Calls a function in a thread of its own, so that Ctrl-C counts when it is done.

    Signal handlers run in the main thread alone. A second Ctrl-C does not wait.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(function).result()


def restore_interrupted(path: Path) -> None:
    """Puts back the folder that a killed `replace_folder` had moved aside.

    Does nothing where something is at the path. Systems that exchange folders in one step never
    need it.
    """
    target = Path(os.path.realpath(path))
    if target.exists():
        return
    for old in sorted(target.parent.glob(f".{glob.escape(target.name)}.*/{_OLD}")):
        # Another process may have put it back in the meantime.
        with contextlib.suppress(OSError):
            os.replace(old, target)
            shutil.rmtree(old.parent, ignore_errors=True)
            return


def existing_model(path: str | Path) -> Path:
    """Returns the path of a file or a folder that is there; see `existing_path`.

    A folder whose replacement was interrupted is put back first.
    """
    restore_interrupted(local_path(path, "`path`"))
    return existing_path(path, "`path`")


def exchange_paths(first: Path, second: Path) -> bool:
    """Lets two paths exchange what they name, in one step that cannot be interrupted.

    Returns:
        Whether it was done: not every system and file system can.
    """
    try:
        library = ctypes.CDLL(None, use_errno=True)
        first_name = os.fsencode(first)
        second_name = os.fsencode(second)
        if sys.platform == "darwin":
            return library.renamex_np(first_name, second_name, _RENAME_SWAP) == 0
        result = library.renameat2(
            _AT_FDCWD, first_name, _AT_FDCWD, second_name, _RENAME_EXCHANGE
        )
        return result == 0
    # Windows has no such library, and old systems no such function.
    except (OSError, AttributeError, TypeError):
        return False


def refuse_other_files(path: Path, expected: set[str]) -> None:
    """Refuses a place that holds anything but a model: it may be somebody's work.

    Args:
        path: of a folder or a file that is there.
        expected: names that the folder may hold.

    Raises:
        ValueError: a file, or a folder with other files.
    """
    if not path.is_dir():
        raise ValueError(f"`{path}` is a file; give an empty or a new folder.")
    present = {entry.name for entry in path.iterdir()}
    others = sorted(present - expected)
    if others:
        raise ValueError(
            f"`{path}` holds other files, {others[0]} for one; "
            "give an empty or a new folder."
        )
