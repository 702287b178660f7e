"""Folders that hold one model: reading their JSON file and replacing them atomically."""

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

# The name of a folder while a new one replaces it.
_OLD = "old"

# The end that `mkdtemp` gives to a name. With "*" the workspaces of "model" would include those of
# "model.v2".
_UNIQUE = "[a-z0-9_]" * 8

# The flag of Linux's `renameat2` that exchanges two paths, and the handle of the working directory.
_RENAME_EXCHANGE = 2

_AT_FDCWD = -100

# The equivalent flag of macOS.
_RENAME_SWAP = 2


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
        ValueError: the path is a device or a pipe, or the file does not hold a JSON object.
    """
    if is_special(path):
        raise ValueError(f"`{path}` must be a file; it is a device or a pipe.")
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"`{path}` is empty; it must hold a JSON object.")
    try:
        table = parse_json(content)
    except ValueError as error:
        raise ValueError(f"`{path}` is not JSON, or is truncated: {error}.") from None
    if not isinstance(table, dict):
        kind = type(table).__name__
        raise ValueError(f"`{path}` must hold a JSON object; got a {kind}.")
    return table


def replace_folder(
    path: Path,
    expected: set[str],
    fill: Callable[[Path], None],
) -> None:
    """Writes a folder atomically: a failed write leaves the previous folder in place.

    Args:
        path: path of the folder, which need not exist.
        expected: the only names that an existing folder may hold; otherwise it is not replaced.
        fill: called with a path that does not exist yet; creates and fills the folder there.

    Raises:
        ValueError: the folder at `path` holds other files.
    """
    # A symbolic link is kept; the folder that it points to is replaced.
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
            # A kill between the two renames leaves both folders in the workspace, from which
            # `restore_interrupted` recovers the old one.
            os.replace(path, old)
            os.replace(new, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        run_to_end(functools.partial(shutil.rmtree, workspace, ignore_errors=True))


def run_to_end(function: Callable[[], None]) -> None:
    """Calls a function in its own thread, so that Ctrl-C takes effect only after it returns.

    Signal handlers run only in the main thread. A second Ctrl-C takes effect at once.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(function).result()


def restore_interrupted(path: Path) -> None:
    """Restores the folder that a killed `replace_folder` had moved aside.

    Does nothing if the path exists. Systems that can exchange two folders atomically never need it.
    """
    target = Path(os.path.realpath(path))
    if target.exists():
        return
    workspaces = f".{glob.escape(target.name)}.{_UNIQUE}"
    for old in sorted(target.parent.glob(f"{workspaces}/{_OLD}")):
        # Another process may have restored it in the meantime.
        with contextlib.suppress(OSError):
            os.replace(old, target)
            shutil.rmtree(old.parent, ignore_errors=True)
            return


def existing_model(path: str | Path) -> Path:
    """Returns the path of an existing file or folder; see `existing_path`.

    A folder whose replacement was interrupted is restored first.
    """
    restore_interrupted(local_path(path, "`path`"))
    return existing_path(path, "`path`")


def exchange_paths(first: Path, second: Path) -> bool:
    """Exchanges two paths atomically.

    Returns:
        Whether the exchange was done: not every system and file system supports it.
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
    # Windows lacks the library; old systems lack the function.
    except (OSError, AttributeError, TypeError):
        return False


def refuse_other_files(path: Path, expected: set[str]) -> None:
    """Rejects a path that holds anything but a model, which may be someone's work.

    Args:
        path: path of an existing file or folder.
        expected: the only names that the folder may hold.

    Raises:
        ValueError: the path is a file, or a folder with other files.
    """
    if not path.is_dir():
        raise ValueError(f"`{path}` is a file; give an empty or a new folder.")
    present = {entry.name for entry in path.iterdir()}
    others = sorted(present - expected)
    if others:
        raise ValueError(
            f"`{path}` holds other files, such as {others[0]}; "
            "give an empty or a new folder."
        )
