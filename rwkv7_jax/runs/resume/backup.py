"""A copy of a run in an object store, from which another machine continues it.

A store has keys and no folders, and nothing in it can be renamed. A step counts once its manifest
is there, which is written after all its other files, in one request. What comes back is compared
with the manifest, so that a step which was copied half, or changed since, is passed over.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.checks import first_line
from rwkv7_jax.runs.exit_codes import DiskError, warn
from rwkv7_jax.runs.resume import step_directories
from rwkv7_jax.runs.run_lock import (
    HEARTBEATS,
    LOCK,
    announce_wait,
    describe_holder,
    own_name,
    parse_holder,
)

# The folder of steps in a run's folder.
STEPS = "checkpoints"

# Seconds between two signs of life of the process that holds the lock: stores take one write to a
# key in a second, and ask money for it.
HEARTBEAT_SECONDS = 10.0

# Seconds after which a store that does not answer counts as absent.
_TIMEOUT_SECONDS = 120.0

# Files that are on their way at the same time.
_TRANSFERS = 8

# Folders of a run that another machine does not need.
_NOT_COPIED = {STEPS, "profile"}

_MANIFEST_KEY = re.compile(rf"{STEPS}/(\d+)/{re.escape(step_directories.MANIFEST)}")


class Backup:
    """The copy of one run's newest steps and of the files around them.

    One process at a time may write to it: its name lies under the key `run.lock`, and it writes
    that key again every few seconds, each time on the condition that it still holds what it wrote
    last. A process that another one has displaced notices it there and copies nothing any more.

    Attributes:
        url: of the store, as the user wrote it.
    """

    def __init__(self, url: str, workdir: Path):
        """Opens the store and takes its lock.

        Args:
            url: "gs://bucket/run", "s3://bucket/run" or "file:///folder".
            workdir: the folder of the run.

        Raises:
            ValueError: another process works there, or the store lies inside the folder.
            DiskError: the store cannot be read or written.
        """
        self.url = url
        self._workdir = workdir
        _refuse_inside(url, workdir)
        # Size and time of the files that the store has already.
        self._copied: dict[str, tuple[int, int]] = {}
        self._released = threading.Event()
        self._displaced = False
        # Tells this holder from every other, one of the same process and machine included.
        self._token = secrets.token_hex(8)
        with self._named_errors():
            self._store = _open(url)
            self._generation = self._take_lock()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def _take_lock(self) -> bytes:
        found = self._read_lock()
        holder = parse_holder(found.value)
        if holder:
            who = describe_holder(holder)
            seconds = HEARTBEATS * HEARTBEAT_SECONDS
            announce_wait(seconds, who, f"writes to {self.url}")
            time.sleep(seconds)
            generation = found.stamp.generation
            found = self._read_lock()
            if found.stamp.generation != generation and parse_holder(found.value):
                raise ValueError(
                    f"`config.backup` {self.url} is in use by {who}; wait for it or name another "
                    "place."
                )
        generation = self._write_lock(found.stamp.generation)
        if not generation:
            raise ValueError(
                f"`config.backup` {self.url} was taken by another process at this moment; name "
                "another place."
            )
        return generation

    def _read_lock(self) -> Any:
        return self._store.read(LOCK).result(timeout=_TIMEOUT_SECONDS)

    def _write_lock(self, expected: bytes) -> bytes:
        """Writes the lock if it still is as expected; returns its generation, empty if not."""
        holder = {**own_name(), "time": time.time(), "token": self._token}
        written = self._store.write(LOCK, json.dumps(holder), if_equal=expected)
        return written.result(timeout=_TIMEOUT_SECONDS).generation

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            # A store may be away for a moment.
            with contextlib.suppress(Exception):
                generation = self._write_lock(self._generation)
                if not generation:
                    found = self._read_lock()
                    if parse_holder(found.value).get("token") != self._token:
                        self._displaced = True
                        return
                    # An earlier beat, whose answer did not come in time, was written after all.
                    generation = found.stamp.generation
                self._generation = generation

    def fetch(self) -> int | None:
        """Copies the newest intact step to the run's folder if it is newer than all steps there.

        The files around it come with it.

        Returns:
            The step; None if there was nothing to copy.

        Raises:
            DiskError: the store cannot be read, or the folder cannot be written.
        """
        folder = self._workdir / STEPS
        newest = max(step_directories.saved_steps(folder), default=-1)
        with self._named_errors():
            keys = [key.decode() for key in self._store.list().result()]
            for step in sorted(_steps(keys), reverse=True):
                if step <= newest:
                    return None
                prefix = f"{STEPS}/{step}/"
                place = folder / step_directories.SAVING / str(step)
                shutil.rmtree(place, ignore_errors=True)
                self._download(
                    {
                        key: place / key.removeprefix(prefix)
                        for key in _under(keys, prefix)
                    }
                )
                if broken := step_directories.verify_manifest(place):
                    warn(
                        f"step {step} in {self.url} is damaged ({', '.join(broken[:3])}); an older "
                        "one is taken"
                    )
                    continue
                self._download(
                    {key: self._workdir / key for key in keys if _is_copied(key)}
                )
                # Last: once the step is there, nothing is fetched again.
                os.rename(place, folder / str(step))
                print(f"backup    step {step} was copied from {self.url}", flush=True)
                return step
        return None

    def copy_steps(self) -> None:
        """Copies the steps that the store lacks, then the run's files, and drops older steps.

        Raises:
            DiskError: the store cannot be written, or another process has taken it over.
        """
        folder = self._workdir / STEPS
        with self._named_errors():
            self._require_lock()
            there = _steps(key.decode() for key in self._store.list().result())
            here = step_directories.saved_steps(folder)
            for step in sorted(set(here) - there):
                self._upload_step(folder / str(step), f"{STEPS}/{step}/")
            self.copy_files()
            # Only now: a machine that is lost before could continue from the older ones alone.
            for step in there - set(here):
                self._delete_step(f"{STEPS}/{step}/")

    def copy_files(self) -> None:
        """Copies the run's files that are new or have changed, without its steps.

        Raises:
            DiskError: the store cannot be written, or another process has taken it over.
        """
        with self._named_errors():
            self._require_lock()
            changed = {}
            versions = {}
            for path in sorted(self._workdir.rglob("*")):
                key = path.relative_to(self._workdir).as_posix()
                if not _is_copied(key) or not path.is_file():
                    continue
                status = path.stat()
                version = (status.st_size, status.st_mtime_ns)
                if self._copied.get(key) != version:
                    changed[key] = path
                    versions[key] = version
            self._upload(changed)
            # Only now: files of a batch that failed are copied with the next one.
            self._copied |= versions

    def release(self) -> None:
        """Gives the store back; a process that takes it then need not wait."""
        self._released.set()
        # A sign of life that is under way changes the generation.
        self._heart.join()
        # The next process waits for signs of life where this fails.
        with contextlib.suppress(Exception):
            self._store.write(LOCK, b"", if_equal=self._generation).result(
                timeout=_TIMEOUT_SECONDS
            )

    def _require_lock(self) -> None:
        if self._displaced:
            raise DiskError("another process has taken it over")

    def _upload_step(self, folder: Path, prefix: str) -> None:
        files = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                files[prefix + path.relative_to(folder).as_posix()] = path
        manifest = prefix + step_directories.MANIFEST
        last = {manifest: files.pop(manifest)}
        self._upload(files)
        self._upload(last)

    def _delete_step(self, prefix: str) -> None:
        # The manifest first: without it the step counts no longer.
        self._store.write(prefix + step_directories.MANIFEST, None).result()
        keys = [key.decode() for key in self._store.list().result()]
        for key in _under(keys, prefix):
            self._store.write(key, None).result()

    def _upload(self, files: Mapping[str, Path]) -> None:
        def put(key: str, path: Path) -> None:
            self._store.write(key, path.read_bytes()).result()

        _in_parallel(put, files)

    def _download(self, files: Mapping[str, Path]) -> None:
        def get(key: str, path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = self._store.read(key).result().value
            with atomic_write(path) as file:
                file.write(content)

        _in_parallel(get, files)

    @contextlib.contextmanager
    def _named_errors(self):
        """Turns whatever a store or a disk raises into one sentence that names the store."""
        try:
            yield
        except DiskError as error:
            if str(error).startswith("`config.backup`"):
                raise
            raise DiskError(f"`config.backup` {self.url}: {error}.") from None
        # `ValueError` is a refusal of ours, and also what TensorStore raises for most failures.
        except Exception as error:
            if str(error).startswith("`config.backup`"):
                raise
            reason = first_line(error)
            raise DiskError(
                f"`config.backup` {self.url} cannot be read or written: {reason}."
            ) from None


def _open(url: str) -> Any:
    # An import of a second, for runs that have a backup.
    import tensorstore

    base = url if url.endswith("/") else f"{url}/"
    return tensorstore.KvStore.open(base).result(timeout=_TIMEOUT_SECONDS)


def _refuse_inside(url: str, workdir: Path) -> None:
    parts = urlparse(url)
    if parts.scheme != "file":
        return
    place = Path(os.path.realpath(unquote(parts.path)))
    if place.is_relative_to(os.path.realpath(workdir)):
        raise ValueError(
            f"`config.backup` must lie outside the run's folder, which it copies; got {url}."
        )


def _steps(keys: Iterable[str]) -> set[int]:
    """Returns the steps that were copied to the end."""
    matches = [_MANIFEST_KEY.fullmatch(key) for key in keys]
    return {int(match[1]) for match in matches if match}


def _under(keys: Iterable[str], prefix: str) -> list[str]:
    return [key for key in keys if key.startswith(prefix) and _is_safe(key)]


def _is_copied(key: str) -> bool:
    """Tells whether a file of a run, by its path there, belongs to the copy."""
    path = PurePosixPath(key)
    # Hidden files are those that are being written. The lock is of this machine.
    hidden = path.name.startswith((".", LOCK))
    return _is_safe(key) and not hidden and _NOT_COPIED.isdisjoint(path.parts)


def _is_safe(key: str) -> bool:
    """Tells whether a key is a path that stays inside a folder."""
    path = PurePosixPath(key)
    return not path.is_absolute() and ".." not in path.parts


def _in_parallel(
    transfer: Callable[[str, Path], None], files: Mapping[str, Path]
) -> None:
    with ThreadPoolExecutor(max_workers=_TRANSFERS) as threads:
        # Drawing the results raises what a thread raised.
        list(threads.map(transfer, files.keys(), files.values()))
