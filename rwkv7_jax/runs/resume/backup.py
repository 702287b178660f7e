"""A copy of a run in an object store, from which another machine continues it.

What comes back of a step is compared with its manifest, so that a step which was copied half, or
changed since, is passed over.
"""

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from pathlib import Path, PurePosixPath

from rwkv7_jax.runs.exit_codes import DiskError, InUse, warn
from rwkv7_jax.runs.resume.object_store import ObjectStore, is_inside
from rwkv7_jax.runs.resume.step_directories import (
    SAVING,
    saved_steps,
    verify_manifest,
)
from rwkv7_jax.runs.resume.steps import MANIFEST
from rwkv7_jax.runs.resume.stored_logs import PARTS, StoredLogs, is_long_log
from rwkv7_jax.runs.resume.stored_steps import StoredSteps
from rwkv7_jax.runs.run_lock import (
    HEARTBEATS,
    LOCK,
    announce_wait,
    describe_holder,
    own_name,
    parse_holder,
)
from rwkv7_jax.runs.waiting import report_wait

# The folder of steps in a run's folder.
STEPS = "checkpoints"

# Seconds between two signs of life of the process that holds the lock: stores take one write to a
# key in a second, and ask money for it.
HEARTBEAT_SECONDS = 10.0

# Folders of a run that another machine does not need, or gets in another way.
_NOT_COPIED = {STEPS, PARTS, "profile"}


class Backup:
    """The copy of one run's newest steps and of the files around them.

    One process at a time may write to it: its name lies under the key `run.lock`, and it writes
    that key again every few seconds, each time on the condition that it still holds what it wrote
    last. A process that another one has displaced notices it there and copies nothing any more.

    Attributes:
        steps: those in the store.
    """

    def __init__(self, store: ObjectStore, workdir: Path):
        """Takes the lock of the store.

        Args:
            store: for the copy.
            workdir: the folder of the run.

        Raises:
            InUse: another process works there.
            ValueError: the store lies inside the folder.
            DiskError: the store cannot be read or written.
        """
        self._store = store
        self._workdir = workdir
        _refuse_inside(store, workdir)
        self.steps = StoredSteps(store, STEPS, self._require_lock)
        self._logs = StoredLogs(store, self._require_lock)
        # Size and time of the files that the store has already.
        self._copied: dict[str, tuple[int, int]] = {}
        self._released = threading.Event()
        self._displaced = False
        # Tells this holder from every other, one of the same process and machine included.
        self._token = secrets.token_hex(8)
        self._generation = self._take_lock()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def _take_lock(self) -> bytes:
        text, generation = self._store.read(LOCK)
        holder = parse_holder(text)
        if holder:
            who = describe_holder(holder)
            seconds = HEARTBEATS * HEARTBEAT_SECONDS
            announce_wait(seconds, who, f"writes to {self._store.url}")
            time.sleep(seconds)
            before = generation
            text, generation = self._store.read(LOCK)
            if generation != before and parse_holder(text):
                raise InUse(
                    f"`config.backup` {self._store.url} is in use by {who}; wait for it or name "
                    "another place."
                )
        taken = self._write_lock(generation)
        if not taken:
            raise InUse(
                f"`config.backup` {self._store.url} was taken by another process at this moment; "
                "name another place."
            )
        return taken

    def _write_lock(self, expected: bytes) -> bytes:
        """Writes the lock if it still is as expected; returns its generation, empty if not."""
        holder = {**own_name(), "time": time.time(), "token": self._token}
        return self._store.write(LOCK, json.dumps(holder), expected=expected)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            # A store may be away for a moment.
            with contextlib.suppress(DiskError):
                generation = self._write_lock(self._generation)
                if not generation:
                    text, generation = self._store.read(LOCK)
                    # Otherwise an earlier beat, whose answer did not come in time, was written.
                    if parse_holder(text).get("token") != self._token:
                        self._displaced = True
                        return
                self._generation = generation

    def newer_steps(self) -> list[int]:
        """Returns the steps that are newer than all in the run's folder, the newest first.

        Raises:
            DiskError: the store cannot be read.
        """
        newest = max(saved_steps(self._workdir / STEPS), default=-1)
        return [step for step in self.steps.complete() if step > newest]

    def fetch_files(self) -> None:
        """Copies the files of the run to its folder, without its steps, if there is a newer one.

        Raises:
            DiskError: the store cannot be read, or the folder cannot be written.
        """
        if self.newer_steps():
            keys = filter(_is_copied, self._store.list())
            with report_wait(f"the files of the run from {self._store.url}"):
                self._store.download({key: self._workdir / key for key in keys})
                self._logs.download(self._workdir)

    def fetch_step(self) -> None:
        """Copies the newest intact step to the run's folder if it is newer than all steps there.

        Raises:
            DiskError: the store cannot be read, or the folder cannot be written.
        """
        folder = self._workdir / STEPS
        for step in self.newer_steps():
            place = folder / SAVING / str(step)
            shutil.rmtree(place, ignore_errors=True)
            files = self.steps.files(step) | {MANIFEST: self.steps.key(step, MANIFEST)}
            with report_wait(f"step {step} from {self._store.url}"):
                self._store.download({key: place / name for name, key in files.items()})
            if broken := verify_manifest(place):
                warn(
                    f"step {step} in {self._store.url} is damaged ({', '.join(broken[:3])}); an "
                    "older one is taken"
                )
                continue
            os.rename(place, folder / str(step))
            print(
                f"backup    step {step} was copied from {self._store.url}", flush=True
            )
            return

    def copy_steps(self) -> None:
        """Copies the steps that the store lacks, then the run's files, and drops older steps.

        Raises:
            DiskError: the store cannot be written, or another process has taken it over.
        """
        self._require_lock()
        folder = self._workdir / STEPS
        here = saved_steps(folder)
        for step in sorted(set(here) - set(self.steps.complete())):
            self._upload_step(step, folder / str(step))
        self.copy_files()
        # Only now: a machine that is lost before could continue from the older ones alone.
        self.steps.keep_only(here)

    def copy_newer_steps(self) -> None:
        """Copies the steps of the run's folder if one of them is newer than all in the store.

        A run on fewer processes saved it there, and its last copy failed.

        Raises:
            DiskError: as `copy_steps`.
        """
        newest = max(saved_steps(self._workdir / STEPS), default=-1)
        if newest > max(self.steps.complete(), default=-1):
            self.copy_steps()

    def copy_files(self) -> None:
        """Copies the run's files that are new or have changed, without its steps.

        Of a long log, what is new of it.

        Raises:
            DiskError: the store cannot be written, or another process has taken it over.
        """
        self._require_lock()
        changed = {}
        versions = {}
        logs = {}
        for path in sorted(self._workdir.rglob("*")):
            key = path.relative_to(self._workdir).as_posix()
            if not _is_copied(key) or not path.is_file():
                continue
            if is_long_log(path):
                logs[key] = path
                continue
            status = path.stat()
            version = (status.st_size, status.st_mtime_ns)
            if self._copied.get(key) != version:
                changed[key] = path
                versions[key] = version
        self._store.upload(changed)
        # Only now: files of a batch that failed are copied with the next one.
        self._copied |= versions
        self._logs.upload(logs)

    def release(self) -> None:
        """Gives the store back; a process that takes it then need not wait."""
        self._released.set()
        # A sign of life that is under way changes the generation.
        self._heart.join()
        # The next process waits for signs of life where this fails.
        with contextlib.suppress(DiskError):
            self._store.write(LOCK, b"", expected=self._generation)

    def _require_lock(self) -> None:
        if self._displaced:
            raise DiskError(
                f"`config.backup` {self._store.url}: another process has taken it over."
            )

    def _upload_step(self, step: int, folder: Path) -> None:
        files = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                files[self.steps.key(step, name)] = path
        manifest = self.steps.key(step, MANIFEST)
        last = {manifest: files.pop(manifest)}
        self._store.upload(files)
        self._store.upload(last)


def _refuse_inside(store: ObjectStore, workdir: Path) -> None:
    folder = store.local_folder()
    if folder is None:
        return
    place = Path(os.path.realpath(folder))
    if place.is_relative_to(os.path.realpath(workdir)):
        raise ValueError(
            f"`config.backup` must lie outside the run's folder, which it copies; got {store.url}."
        )


def _is_copied(key: str) -> bool:
    """Tells whether a file of a run, by its path there, belongs to the copy."""
    path = PurePosixPath(key)
    # Hidden files are those that are being written. The lock is of this machine.
    hidden = path.name.startswith((".", LOCK))
    return is_inside(key) and not hidden and _NOT_COPIED.isdisjoint(path.parts)
