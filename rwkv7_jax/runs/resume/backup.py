"""A copy of a run in an object store, from which another machine can resume it.

A downloaded step is compared with its manifest. A step that was copied only in part, or has changed
since, is skipped.
"""

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from pathlib import Path, PurePosixPath

from rwkv7_jax.json_files import parse_json
from rwkv7_jax.runs.exit_codes import DiskError, InUse, warn
from rwkv7_jax.runs.resume.object_store import ObjectStore, is_inside
from rwkv7_jax.runs.resume.run_identity import Identity, identity_differences
from rwkv7_jax.runs.resume.step_directories import (
    StepDirectories,
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

# The folder of the steps within a run directory.
STEPS = "checkpoints"

# The file of a step in which Orbax stores its record.
RECORD = "record/metadata"

# Seconds between two heartbeats of the process that holds the lock. Stores accept one write per
# second to a key, and charge for each.
HEARTBEAT_SECONDS = 10.0

# Folders of a run that another machine does not need, or that are copied in another way.
_NOT_COPIED = {STEPS, PARTS, "profile"}


class Backup:
    """The copy of one run's newest steps and of its other files.

    Only one process at a time may write to it. That process writes its name to the key `run.lock`
    and rewrites the key every few seconds, on the condition that nobody else has written to it
    since. If another process has, the displaced one notices and stops copying.

    Attributes:
        steps: the steps in the store.
    """

    def __init__(self, store: ObjectStore, workdir: Path):
        """Takes the lock of the store.

        Args:
            store: the store to copy to.
            workdir: the run directory.

        Raises:
            InUse: another process holds the lock.
            ValueError: the store is inside the run directory.
            DiskError: the store cannot be read or written.
        """
        self._store = store
        self._workdir = workdir
        self._local_steps = StepDirectories(workdir / STEPS)
        _require_outside(store, workdir)
        self.steps = StoredSteps(store, STEPS, self._require_lock)
        self._logs = StoredLogs(store, self._require_lock)
        # What changes with each file, as it was when the file was last copied.
        self._copied: dict[str, tuple[int, int, int]] = {}
        # The steps that this process has downloaded.
        self._tried: set[int] = set()
        self._released = threading.Event()
        self._displaced = False
        # Distinguishes this holder from all others, including one in the same process.
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
                    f"`config.backup` {self._store.url} is in use by {who}; wait for it to end or "
                    "name another URL."
                )
        taken = self._write_lock(generation)
        if not taken:
            raise InUse(
                f"`config.backup` {self._store.url} was just locked by another process; name "
                "another URL."
            )
        return taken

    def _write_lock(self, expected: bytes) -> bytes:
        """Writes the lock if it has the expected generation; returns the new one, empty if not."""
        holder = {**own_name(), "time": time.time(), "token": self._token}
        return self._store.write(LOCK, json.dumps(holder), expected=expected)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            # The store may be unreachable for a moment; the next beat tries again.
            with contextlib.suppress(DiskError):
                generation = self._write_lock(self._generation)
                if not generation:
                    text, generation = self._store.read(LOCK)
                    # With the own token, an earlier beat was written although its reply timed out.
                    if parse_holder(text).get("token") != self._token:
                        self._displaced = True
                        return
                self._generation = generation

    def newer_steps(self) -> list[int]:
        """Returns the stored steps that are newer than all local ones, newest first.

        Raises:
            DiskError: the store cannot be read.
        """
        newest = max(self._local_steps.complete(), default=-1)
        return [step for step in self.steps.complete() if step > newest]

    def fetch_files(self) -> None:
        """Downloads the run's files, except its steps, if the store has a newer step.

        Raises:
            ValueError: the store holds another run than the run directory.
            DiskError: the store cannot be read, or the run directory cannot be written.
        """
        self._require_same_run()
        if self.newer_steps():
            keys = filter(_is_copied, self._store.list())
            with report_wait(f"the files of the run from {self._store.url}"):
                self._store.download({key: self._workdir / key for key in keys})
                self._logs.download(self._workdir)

    def _require_same_run(self) -> None:
        """Checks that stored and local steps belong to one run: copies replace the older ones.

        Raises:
            ValueError: they belong to two runs.
            DiskError: the store cannot be read.
        """
        stored = self.steps.complete()
        local = self._local_steps.complete()
        if not stored or not local:
            return
        there, _ = self._store.read(self.steps.key(stored[0], RECORD))
        here = b""
        # Without the file the step is damaged, which tells nothing.
        with contextlib.suppress(OSError):
            here = (self._local_steps.path(local[0]) / RECORD).read_bytes()
        if found := identity_differences(_identity_in(there), _identity_in(here)):
            raise ValueError(
                f"`config.backup` {self._store.url} must be the copy of the run in "
                f"{self._workdir}; it holds a run whose {found}. Name another URL."
            )

    def fetch_step(self) -> None:
        """Downloads the newest intact step if it is newer than all local steps.

        It tries no step twice: the caller may have found that one does not fit or has NaN.

        Raises:
            DiskError: the store cannot be read, or the run directory cannot be written.
        """
        for step in self.newer_steps():
            if step in self._tried:
                continue
            self._tried.add(step)
            place = self._local_steps.unfinished(step)
            shutil.rmtree(place, ignore_errors=True)
            files = self.steps.files(step) | {MANIFEST: self.steps.key(step, MANIFEST)}
            with report_wait(f"step {step} from {self._store.url}"):
                self._store.download({key: place / name for name, key in files.items()})
            if broken := verify_manifest(place):
                warn(
                    f"step {step} in {self._store.url} is damaged ({', '.join(broken[:3])}); "
                    "an older one is used"
                )
                continue
            self._local_steps.adopt(step)
            print(
                f"backup    step {step} was copied from {self._store.url}", flush=True
            )
            return

    def copy_steps(self) -> None:
        """Uploads missing steps and the run's files, then deletes the steps that are not local.

        Raises:
            DiskError: the store cannot be written, or another process has taken over its lock.
        """
        self._require_lock()
        here = self._local_steps.complete()
        for step in sorted(set(here) - set(self.steps.complete())):
            self._upload_step(step)
        self.copy_files()
        # Last: until the new steps are complete, a run can resume only from the older ones.
        self.steps.keep_only(here)

    def copy_newer_steps(self) -> None:
        """Uploads the local steps if one of them is newer than all in the store.

        This happens if the last upload of a run on fewer processes failed.

        Raises:
            DiskError: as `copy_steps`.
        """
        newest = max(self._local_steps.complete(), default=-1)
        if newest > max(self.steps.complete(), default=-1):
            self.copy_steps()

    def copy_files(self) -> None:
        """Uploads the run's new and changed files, except its steps.

        Of a long log it uploads only the new parts.

        Raises:
            DiskError: the store cannot be written, or another process has taken over its lock.
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
            # Clocks of disks may be coarse, but a file that was replaced has another inode.
            version = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._copied.get(key) != version:
                changed[key] = path
                versions[key] = version
        self._store.upload(changed)
        # After the upload: if it fails, the next call uploads these files again.
        self._copied |= versions
        self._logs.upload(logs)

    def release(self) -> None:
        """Releases the lock, so that the next process need not wait for heartbeats."""
        self._released.set()
        # A heartbeat in progress changes the generation.
        self._heart.join()
        # If this fails, the next process only has to wait for heartbeats.
        with contextlib.suppress(DiskError):
            self._store.write(LOCK, b"", expected=self._generation)

    def _require_lock(self) -> None:
        if self._displaced:
            raise DiskError(
                f"`config.backup` {self._store.url}: another process has taken over its lock."
            )

    def _upload_step(self, step: int) -> None:
        folder = self._local_steps.path(step)
        files = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                files[self.steps.key(step, name)] = path
        manifest = self.steps.key(step, MANIFEST)
        last = {manifest: files.pop(manifest)}
        self._store.upload(files)
        self._store.upload(last)


def _require_outside(store: ObjectStore, workdir: Path) -> None:
    folder = store.local_folder()
    if folder is None:
        return
    place = Path(os.path.realpath(folder))
    if place.is_relative_to(os.path.realpath(workdir)):
        raise ValueError(
            f"`config.backup` must be outside the run directory, which it copies; got {store.url}."
        )


def _identity_in(record: bytes) -> Identity:
    """Returns the identity of the run in a checkpoint's record; empty if it is damaged."""
    try:
        identity = parse_json(record)["identity"]
        return {group: dict(fields) for group, fields in identity.items()}
    except (ValueError, TypeError, LookupError, AttributeError):
        return {}


def _is_copied(key: str) -> bool:
    """Returns whether to copy a file, by its path relative to the run directory."""
    path = PurePosixPath(key)
    # Hidden files are incomplete. The lock belongs to this machine.
    hidden = path.name.startswith((".", LOCK))
    return is_inside(key) and not hidden and _NOT_COPIED.isdisjoint(path.parts)
