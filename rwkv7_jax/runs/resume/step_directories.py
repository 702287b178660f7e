"""A folder of numbered steps: which there are, whether their files are whole, which stay.

Every step holds a list of its files with their digests. It is written last, into a folder of
another name, which takes its number only then: what has a number and no list, or another list than
its files, was damaged later.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILES = "files.json"

BAD = "bad"

SAVING = ".saving"


def step_numbers(folder: Path) -> list[int]:
    """The steps that the folder has something of, the newest first; whole or not."""
    if not folder.is_dir():
        return []
    return sorted((int(f.name) for f in folder.iterdir() if f.name.isdecimal()), reverse=True)


def unknown_entries(folder: Path) -> list[str]:
    """Names in the folder that are nothing of ours."""
    ours = {BAD, SAVING}
    names = {f.name for f in folder.iterdir()} if folder.is_dir() else set()
    return sorted(name for name in names - ours if not name.isdecimal())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    inside = (path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink())
    return {str(path.relative_to(folder)): path for path in inside}


def _canonical(table: dict[str, str]) -> str:
    return json.dumps(table, sort_keys=True, indent=1)


def write_manifest(folder: Path) -> None:
    """The list of the folder's files is in it, and all of them are on the disk itself."""
    files = _files(folder)
    table = {name: _digest(path) for name, path in files.items()}
    text = _canonical(table)
    own = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    (folder / FILES).write_text(f"{own}\n{text}\n")
    inner = [path for path in folder.rglob("*") if path.is_dir()]
    # Together: one after the other, each would wait for the disk.
    with ThreadPoolExecutor(max_workers=16) as threads:
        list(threads.map(_synced, [*files.values(), folder / FILES, *inner, folder]))


def _synced(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify_manifest(folder: Path) -> list[str]:
    """The files that are not what the folder's list says, the list itself included."""
    files = _files(folder)
    try:
        own, _, text = files.pop(FILES).read_text().partition("\n")
        table = json.loads(text)
        whole = text == _canonical(table) + "\n"
        digest = hashlib.blake2b(text[:-1].encode(), digest_size=16).hexdigest()
    except (OSError, ValueError, KeyError, TypeError):
        return [FILES]
    if not whole or own != digest:
        return [FILES]
    names = dict.fromkeys([*table, *files])
    return [name for name in names if name not in files or table.get(name) != _digest(files[name])]


def quarantine(folder: Path, number: int) -> Path:
    """The step lies under "bad", where nobody takes it for a checkpoint; gives its new place."""
    bad = folder / BAD
    bad.mkdir(exist_ok=True)
    place, again = bad / str(number), 1
    while place.exists():
        place, again = bad / f"{number}.{again}", again + 1
    os.rename(folder / str(number), place)
    return place


def steps_to_keep(
    numbers: Iterable[int], *, newest: int, every: int = 0, best: Iterable[int] = ()
) -> set[int]:
    """The steps that stay.

    Args:
        numbers: all there are.
        newest: how many of the last ones, at least 1.
        every: multiples of this stay for good; 0 for none.
        best: steps that stay for what they are.
    """
    ordered = sorted(numbers)
    stay = set(ordered[-newest:]) | (set(best) & set(ordered))
    return stay | {number for number in ordered if every and number % every == 0}


def discard(folder: Path, number: int) -> None:
    """The step is gone; a kill in between leaves no half of it under its number."""
    doomed = folder / SAVING / f"old.{number}"
    doomed.parent.mkdir(exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder / str(number), doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def discard_saving(folder: Path) -> None:
    """What a failed save left is gone; threads of it that still write are given two seconds."""
    for _ in range(40):
        shutil.rmtree(folder / SAVING, ignore_errors=True)
        time.sleep(0.05)
        if not (folder / SAVING).exists():
            return
