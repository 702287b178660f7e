"""Steps as numbered directories of this machine.

A step is written into a directory with another name, which gets its number once the manifest is on
the disk. So a directory with a number but without a manifest was damaged after it had been saved.
"""

import contextlib
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

# Names of which every step has some: ours, and those that Orbax writes.
_STEP_ENTRIES = {MANIFEST, "record", "train", "_CHECKPOINT_METADATA"}

# Damaged steps are moved here.
BAD = "bad"

# A step is written, and discarded, in here.
SAVING = ".saving"

_SYNC_THREADS = 16


class StepDirectories(Steps):
    """The steps in a folder.

    Attributes:
        place: the folder.
    """

    place: Path

    def __init__(self, folder: Path):
        """Names the folder, which may be absent."""
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
        """Makes the folder, and deletes what an ended process left half written."""
        self.place.mkdir(parents=True, exist_ok=True)
        saving = self.place / SAVING
        if saving.exists() and any(saving.iterdir()):
            warn(f"{saving} held a checkpoint that was never finished; it is removed")
        shutil.rmtree(saving, ignore_errors=True)
        for name in _unknown_entries(self.place):
            warn(f"{self.place / name} is no checkpoint; it is ignored")

    def unfinished(self, number: int) -> Path:
        """Returns a directory that has another name."""
        return self.place / SAVING / str(number)

    def begin(self, number: int) -> None:
        """Makes the folder of the directory."""
        # With its parents: the run's folder may have been deleted while the run worked.
        self.unfinished(number).parent.mkdir(parents=True, exist_ok=True)

    def note_digests(self, number: int, process: int) -> None:
        """Writes a note into the directory."""
        written = self.unfinished(number)
        files = _files(written)
        digests = {name: _file_digest(files[name]) for name in names_of(process, files)}
        with atomic_write(written / note_name(process)) as file:
            file.write(manifest_text(digests).encode())

    def commit(
        self, number: int, *, others: Sequence[int] = (), seconds: float = 0
    ) -> None:
        """Writes the manifest, and then gives the directory its number."""
        written = self.unfinished(number)

        def read(name: str) -> bytes:
            with contextlib.suppress(FileNotFoundError):
                return (written / name).read_bytes()
            return b""

        noted = collect(read, others, seconds)
        # Before the manifest: notes are no files of a step.
        for process in others:
            (written / note_name(process)).unlink()
        write_manifest(written, noted)
        path = self.path(number)
        if os.path.lexists(path):
            warn(f"{path} was in the way; it lies in {self.set_aside(number)} now")
        # After the manifest is on disk: a directory with a number is always complete.
        os.rename(written, path)

    def keep_only(self, numbers: Iterable[int]) -> None:
        """Deletes the other directories; those without a manifest are nothing of ours."""
        for number in set(self.complete()) - set(numbers):
            self._discard(number)

    def _discard(self, number: int) -> None:
        # Renamed first: a process killed half-way must not leave half a step under its number.
        doomed = self.place / SAVING / f"old.{number}"
        doomed.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path(number), doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def give_up(self) -> None:
        """Deletes what a save left; gives its threads, which may still write, two seconds."""
        saving = self.place / SAVING
        for _ in range(40):
            shutil.rmtree(saving, ignore_errors=True)
            time.sleep(0.05)
            if not saving.exists():
                break
        self.place.mkdir(parents=True, exist_ok=True)

    def free_bytes(self) -> int:
        """Returns the free bytes of the disk."""
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
        warn(f"{path} was an empty folder; it is removed")
        return True

    def set_aside(self, number: int) -> str:
        """Moves a directory out of the way."""
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
        """Returns the folder of damaged steps."""
        bad = self.place / BAD
        return str(bad) if bad.is_dir() and any(bad.iterdir()) else ""


def step_numbers(folder: Path) -> list[int]:
    """Returns the numbers of the step directories, intact or not, the newest first."""
    if not folder.is_dir():
        return []
    numbers = [int(item.name) for item in folder.iterdir() if _is_step(item)]
    return sorted(numbers, reverse=True)


def _is_step(item: Path) -> bool:
    """Tells whether an entry can be a step: a directory whose name is the number as we write it."""
    if not is_step_name(item.name) or not item.is_dir():
        return False
    # A step that lost some of its files is damaged; a folder that never had one is a stray.
    names = {inner.name for inner in item.iterdir()}
    return not names or not names.isdisjoint(_STEP_ENTRIES)


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps that were saved whole, which have a manifest, the newest first."""
    numbers = step_numbers(folder)
    return [number for number in numbers if (folder / str(number) / MANIFEST).is_file()]


def _unknown_entries(folder: Path) -> list[str]:
    """Returns the names in the folder that no run of ours made."""
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
    """Writes the manifest, and waits until the disk has it and all the other files.

    Args:
        folder: of a step.
        noted: digests that are known, by the names of files.
    """
    files = _files(folder)
    digests = {}
    for name, path in files.items():
        digests[name] = (noted or {}).get(name) or _file_digest(path)
    (folder / MANIFEST).write_text(manifest_text(digests), encoding="utf-8")
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


def verify_manifest(folder: Path, share: slice = slice(None)) -> list[str]:
    """Returns the files that differ from the manifest, are missing or are new."""
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
