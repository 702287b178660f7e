"""A folder of numbered step directories: which there are, whether they are intact, which to keep.

Each step has a manifest: its files with their digests. It is written last, while the directory
still has another name. So a directory with a number but without a manifest, or with other files
than the manifest says, was damaged after it had been saved.
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

from rwkv7_jax.json_files import parse_json
from rwkv7_jax.text.tokenizer import text_digest

MANIFEST = "files.json"

# Names of which every step has some: ours, and those that Orbax writes.
_STEP_ENTRIES = {MANIFEST, "record", "train", "_CHECKPOINT_METADATA"}

# Damaged steps are moved here.
BAD = "bad"

# A step is written, and discarded, in here.
SAVING = ".saving"

_SYNC_THREADS = 16

# Digits of the largest step; the counter has 32 bits.
_MOST_DIGITS = 10


def step_numbers(folder: Path) -> list[int]:
    """Returns the numbers of the step directories, intact or not, the newest first."""
    if not folder.is_dir():
        return []
    numbers = [int(item.name) for item in folder.iterdir() if _is_step(item)]
    return sorted(numbers, reverse=True)


def _is_step(item: Path) -> bool:
    """Tells whether an entry can be a step: a directory whose name is the number as we write it.

    Files and names such as "007" are somebody else's. `isdecimal` alone would take other scripts'
    digits too, and Python refuses to read numbers of thousands of digits.
    """
    name = item.name
    plain = name.isascii() and name.isdecimal() and len(name) <= _MOST_DIGITS
    if not plain or str(int(name)) != name or not item.is_dir():
        return False
    # A step that lost some of its files is damaged; a folder that never had one is a stray.
    names = {inner.name for inner in item.iterdir()}
    return not names or not names.isdisjoint(_STEP_ENTRIES)


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps that were saved whole, which have a manifest, the newest first."""
    numbers = step_numbers(folder)
    return [number for number in numbers if (folder / str(number) / MANIFEST).is_file()]


def unknown_entries(folder: Path) -> list[str]:
    """Returns the names in the folder that no run of ours made."""
    if not folder.is_dir():
        return []
    names = {item.name for item in folder.iterdir() if not _is_step(item)}
    return sorted(names - {BAD, SAVING})


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.blake2b(digest_size=16)
        ).hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() or path.is_symlink():
            files[str(path.relative_to(folder))] = path
    return files


def _canonical(digests: dict[str, str]) -> str:
    return json.dumps(digests, sort_keys=True, indent=1)


def write_manifest(folder: Path) -> None:
    """Writes the manifest, and waits until the disk has it and all the other files."""
    files = _files(folder)
    text = _canonical({name: _file_digest(path) for name, path in files.items()})
    # The first line is the digest of the rest: the manifest itself may be damaged, too.
    (folder / MANIFEST).write_text(f"{text_digest(text)}\n{text}\n", encoding="utf-8")
    directories = [path for path in folder.rglob("*") if path.is_dir()]
    # In parallel: one after the other, each call would wait for the disk.
    with ThreadPoolExecutor(max_workers=_SYNC_THREADS) as threads:
        synced = threads.map(
            _fsync, [*files.values(), folder / MANIFEST, *directories, folder]
        )
        # Drawing the results raises what a thread raised.
        list(synced)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify_manifest(folder: Path) -> list[str]:
    """Returns the files that differ from the manifest, are missing or are new."""
    files = _files(folder)
    digests = _read_manifest(folder)
    files.pop(MANIFEST, None)
    if digests is None:
        return [MANIFEST]
    broken = []
    for name in dict.fromkeys([*digests, *files]):
        if name not in files or digests.get(name) != _file_digest(files[name]):
            broken.append(name)
    return broken


def _read_manifest(folder: Path) -> dict[str, str] | None:
    """Returns the digests by file name; None of a manifest that is missing or damaged."""
    try:
        first_line, _, text = (
            (folder / MANIFEST).read_text(encoding="utf-8").partition("\n")
        )
        digests = parse_json(text)
        canonical = _canonical(digests)
    except (OSError, ValueError, TypeError):
        return None
    if not isinstance(digests, dict):
        return None
    # Only the exact text counts: JSON forgives changed white space, a damaged file must not.
    if text != canonical + "\n" or first_line != text_digest(canonical):
        return None
    return digests


def quarantine(folder: Path, number: int) -> Path:
    """Moves a damaged step out of the way and returns its new path."""
    bad = folder / BAD
    bad.mkdir(parents=True, exist_ok=True)
    place = bad / str(number)
    attempt = 0
    while os.path.lexists(place):
        attempt += 1
        place = bad / f"{number}.{attempt}"
    os.rename(folder / str(number), place)
    return place


def steps_to_keep(
    numbers: Iterable[int],
    *,
    newest: int,
    every: int | None = None,
    best: Iterable[int] = (),
) -> set[int]:
    """Returns the steps that retention keeps.

    Args:
        numbers: all steps.
        newest: how many of the last ones are kept, at least 1.
        every: multiples of this are kept for good; None for none.
        best: steps that are kept because of their evaluation.
    """
    ordered = sorted(numbers)
    # `newest` is at least 1: a slice from -0 would keep everything.
    keep = set(ordered[-newest:])
    keep |= set(best) & set(ordered)
    if every:
        keep |= {number for number in ordered if number % every == 0}
    return keep


def discard(folder: Path, number: int) -> None:
    """Deletes a step.

    It is renamed first: a process killed half-way must not leave half a step under its number.
    """
    doomed = folder / SAVING / f"old.{number}"
    doomed.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder / str(number), doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def discard_saving(folder: Path) -> None:
    """Deletes what a failed save left; gives its threads, which may still write, two seconds."""
    for _ in range(40):
        shutil.rmtree(folder / SAVING, ignore_errors=True)
        time.sleep(0.05)
        if not (folder / SAVING).exists():
            return
