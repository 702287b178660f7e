"""Checkpoints as numbered directories on a disk.

A step is written to a directory of another name, which is renamed to its number once the manifest
is on disk. A numbered directory without a manifest was therefore damaged after the save.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.runs.exit_codes import warn
from rwkv7_jax.runs.resume.noted_digests import collect, names_of, note_name
from rwkv7_jax.runs.resume.steps import (
    MANIFEST,
    Steps,
    is_step_name,
    manifest_text,
    new_hash,
    read_manifest,
)

# Every step has some of these entries: the manifest, and those that Orbax writes.
_STEP_ENTRIES = {MANIFEST, "record", "train", "_CHECKPOINT_METADATA"}

# The folder for damaged steps.
BAD = "bad"

# The folder in which steps are written and deleted.
SAVING = ".saving"

_SYNC_THREADS = 16


class StepDirectories(Steps):
    """The steps in a folder.

    Attributes:
        place: the folder.
    """

    place: Path

    def __init__(self, folder: Path):
        """Stores the folder, which need not exist."""
        self.place = folder

    def numbers(self) -> list[int]:
        """Returns the numbers of the step directories."""
        return step_numbers(self.place)

    def complete(self) -> list[int]:
        """Returns the numbers of the directories with a manifest."""
        return saved_steps(self.place)

    def path(self, number: int) -> Path:
        """Returns a step's directory."""
        return self.place / str(number)

    def clean(self) -> None:
        """Creates the folder and deletes the incomplete steps of an earlier process."""
        self.place.mkdir(parents=True, exist_ok=True)
        saving = self.place / SAVING
        if saving.exists() and any(saving.iterdir()):
            warn(f"{saving} contained an incomplete checkpoint; it was deleted")
        shutil.rmtree(saving, ignore_errors=True)
        for name in _unknown_entries(self.place):
            warn(f"{self.place / name} is not a checkpoint; it is ignored")

    def unfinished(self, number: int) -> Path:
        """Returns the temporary directory of a step."""
        return self.place / SAVING / str(number)

    def begin(self, number: int) -> None:
        """Creates the parent of the temporary directory."""
        # With all parents: somebody may have deleted the run directory during the run.
        self.unfinished(number).parent.mkdir(parents=True, exist_ok=True)

    def note_digests(self, number: int, process: int) -> None:
        """Writes a note to the temporary directory."""
        written = self.unfinished(number)
        files = _files(written)
        digests = {name: _file_digest(files[name]) for name in names_of(process, files)}
        with atomic_write(written / note_name(process)) as file:
            file.write(manifest_text(digests).encode())

    def commit(
        self, number: int, *, others: Sequence[int] = (), seconds: float = 0
    ) -> None:
        """Writes the manifest, then renames the directory to its number."""
        written = self.unfinished(number)

        def read(name: str) -> bytes:
            with contextlib.suppress(FileNotFoundError):
                return (written / name).read_bytes()
            return b""

        noted = collect(read, others, seconds)
        # Before the manifest, which must not list the notes.
        for process in others:
            (written / note_name(process)).unlink()
        write_manifest(written, noted)
        self.adopt(number)

    def adopt(self, number: int) -> None:
        """Renames the temporary directory of a step, whose manifest is on disk, to its number."""
        path = self.path(number)
        if os.path.lexists(path):
            warn(f"{path} was in the way; it is now in {self.set_aside(number)}")
        os.rename(self.unfinished(number), path)
        # Before older steps are deleted: after a power failure the new name must still be there.
        _fsync(self.place)

    def keep_only(self, numbers: Iterable[int]) -> None:
        """Deletes the other directories, except those without a manifest."""
        for number in set(self.complete()) - set(numbers):
            self._discard(number)

    def _discard(self, number: int) -> None:
        # Rename first: a process killed in between must not leave part of a step under its number.
        doomed = self.place / SAVING / f"old.{number}"
        doomed.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path(number), doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def give_up(self) -> None:
        """Deletes what a failed save left; retries for two seconds, as threads may still write."""
        saving = self.place / SAVING
        for _ in range(40):
            shutil.rmtree(saving, ignore_errors=True)
            time.sleep(0.05)
            if not saving.exists():
                break
        self.place.mkdir(parents=True, exist_ok=True)

    def free_bytes(self) -> int:
        """Returns the free bytes on the disk."""
        return shutil.disk_usage(self.place).free

    def broken_files(self, number: int, share: slice = slice(None)) -> list[str]:
        """Compares the files of a directory with its manifest."""
        return verify_manifest(self.path(number), share)

    def drop_if_empty(self, number: int) -> bool:
        """Deletes an empty directory, with a warning."""
        path = self.path(number)
        if any(path.iterdir()):
            return False
        path.rmdir()
        warn(f"{path} was an empty folder; it was deleted")
        return True

    def set_aside(self, number: int) -> str:
        """Moves a directory to the folder for damaged steps."""
        bad = self.place / BAD
        bad.mkdir(parents=True, exist_ok=True)
        place = bad / str(number)
        attempt = 0
        while os.path.lexists(place):
            attempt += 1
            place = bad / f"{number}.{attempt}"
        os.rename(self.path(number), place)
        return str(place)

    def damaged(self) -> str:
        """Returns the folder for damaged steps; empty if it has none."""
        bad = self.place / BAD
        return str(bad) if bad.is_dir() and any(bad.iterdir()) else ""


def step_numbers(folder: Path) -> list[int]:
    """Returns the numbers of the step directories, intact or not, newest first."""
    if not folder.is_dir():
        return []
    numbers = [int(item.name) for item in folder.iterdir() if _is_step(item)]
    return sorted(numbers, reverse=True)


def _is_step(item: Path) -> bool:
    """Returns whether an entry is a step: a numbered directory that is empty or has known files."""
    if not is_step_name(item.name) or not item.is_dir():
        return False
    # A directory that lost some files is a damaged step; one without any known file is unrelated.
    names = {inner.name for inner in item.iterdir()}
    return not names or not names.isdisjoint(_STEP_ENTRIES)


def saved_steps(folder: Path) -> list[int]:
    """Returns the complete steps, which have a manifest, newest first."""
    numbers = step_numbers(folder)
    return [number for number in numbers if (folder / str(number) / MANIFEST).is_file()]


def _unknown_entries(folder: Path) -> list[str]:
    """Returns the names in the folder that no run created."""
    names = {item.name for item in folder.iterdir() if not _is_step(item)}
    return sorted(names - {BAD, SAVING})


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_hash).hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() or path.is_symlink():
            files[str(path.relative_to(folder))] = path
    return files


def write_manifest(folder: Path, noted: Mapping[str, str] | None = None) -> None:
    """Writes the manifest of a step and flushes all its files to disk.

    Args:
        folder: the directory of the step.
        noted: digests that are already known, by file name.
    """
    files = _files(folder)
    digests = {}
    for name, path in files.items():
        digests[name] = (noted or {}).get(name) or _file_digest(path)
    (folder / MANIFEST).write_text(manifest_text(digests), encoding="utf-8")
    directories = [path for path in folder.rglob("*") if path.is_dir()]
    # In parallel, because each call waits for the disk.
    with ThreadPoolExecutor(max_workers=_SYNC_THREADS) as threads:
        synced = threads.map(
            _fsync, [*files.values(), folder / MANIFEST, *directories, folder]
        )
        # Consuming the results raises the errors of the threads.
        list(synced)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems flush files only.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def verify_manifest(folder: Path, share: slice = slice(None)) -> list[str]:
    """Returns the files that differ from the manifest, are missing or are not in it.

    Args:
        folder: the directory of the step.
        share: the part of the list of files to compare.
    """
    files = _files(folder)
    files.pop(MANIFEST, None)
    try:
        digests = read_manifest((folder / MANIFEST).read_bytes())
    except OSError:
        digests = None
    if digests is None:
        return [MANIFEST]
    broken = []
    for name in list(dict.fromkeys([*digests, *files]))[share]:
        if name not in files or digests.get(name) != _file_digest(files[name]):
            broken.append(name)
    return broken
