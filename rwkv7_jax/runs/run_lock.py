"""The lock that lets only one process at a time use a run directory."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv7_jax.atomic_write import flush_to_disk
from rwkv7_jax.json_files import parse_json
from rwkv7_jax.runs.exit_codes import InUse

# The name of the lock in a run directory and in its backup.
LOCK = "run.lock"

# Seconds between two touches of the lock file by its holder. Other machines see no other sign that
# the holder is alive.
HEARTBEAT_SECONDS = 5.0

# Heartbeats to wait for before a holder on another machine counts as dead.
HEARTBEATS = 3


class RunLock:
    """A lock file that names the process that holds it.

    The kernel releases its lock on the file when the process ends, however it ends. If another
    machine holds the lock, or the file system has no locks, the new process watches for some
    seconds whether the holder still touches the file. The clocks of the machines need not agree.
    After a release the empty file remains: if it were deleted, two waiting processes could lock two
    files of the same name.

    The package `filelock` is no substitute: it reports neither who holds a lock nor that the last
    holder died with it, and it has no heartbeat for file systems without locks.

    Attributes:
        stale: the holder that ended without releasing the lock; empty if there was none.
    """

    def __init__(self, path: Path):
        """Takes the lock.

        Raises:
            InUse: another process holds it.
            OSError: the file cannot be written.
        """
        self._path = path
        self.stale = ""
        # Not "w", which would truncate the file of a holder that is still alive.
        self._file = path.open("a+", encoding="utf-8", errors="replace")
        self._file.seek(0)
        text = self._file.read()
        holder = parse_holder(text)
        who = describe_holder(holder)
        locked = self._lock_in_kernel()
        on_other_machine = holder.get("host") != socket.gethostname()
        # On some network file systems the kernel's lock is local to one machine.
        must_watch = bool(text) and (on_other_machine or locked is None)
        if locked is False or (must_watch and _is_touched(path, who)):
            self._file.close()
            raise InUse(
                f"`{path.parent}` is in use by {who}; wait for it or take another folder."
            )
        if text:
            self.stale = who
        # Distinguishes this holder from all others, including one in the same process.
        self._token = secrets.token_hex(8)
        self._write(json.dumps({**own_name(), "token": self._token}) + "\n")
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _lock_in_kernel(self) -> bool | None:
        """Returns whether the kernel granted the lock; None if the file system has no locks."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    def _write(self, text: str) -> None:
        self._file.truncate(0)
        self._file.write(text)
        # Other machines must see it at once, even on a network file system.
        flush_to_disk(self._file)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            # A network file system may be unavailable for a moment.
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def require(self) -> None:
        """Checks that no other process has taken the folder over.

        Raises:
            InUse: another one has: somebody deleted the folder, or this process did not touch the
                lock for too long.
        """
        if other := self._other_holder():
            raise InUse(
                f"`{self._path.parent}` was taken over by {describe_holder(other)}: it was "
                "deleted, or this process was away for too long."
            )

    def _other_holder(self) -> dict[str, Any]:
        """Returns the process that the file names, if it is not this one; else an empty one."""
        try:
            holder = parse_holder(self._path.read_bytes())
        except OSError:
            # Deleted, but not replaced; or a network file system is unavailable for a moment.
            return {}
        return {} if holder.get("token") == self._token else holder

    def release(self) -> None:
        """Releases the lock."""
        self._released.set()
        with contextlib.suppress(OSError):
            if not self._other_holder():
                self._write("")
        self._file.close()


def own_name() -> dict[str, Any]:
    """Returns the content of a lock that this process holds."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def parse_holder(content: str | bytes) -> dict[str, Any]:
    """Parses the holder from the content of a lock; empty if the lock is free or damaged."""
    try:
        holder = parse_json(content or "{}")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def describe_holder(holder: Mapping[str, Any]) -> str:
    """Describes the process that holds a lock, for messages."""
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def announce_wait(seconds: float, who: str, does: str) -> None:
    """Prints how long and why this process waits.

    Args:
        seconds: the length of the wait.
        who: from `describe_holder`.
        does: what that process may still do, such as "works here".
    """
    print(f"waiting {seconds:.0f} s to see whether {who} still {does}", flush=True)


def _is_touched(path: Path, who: str) -> bool:
    """Watches the file for some heartbeats and returns whether its holder touches it."""
    announce_wait(HEARTBEATS * HEARTBEAT_SECONDS, who, "works here")
    before = path.stat().st_mtime_ns
    for _ in range(HEARTBEATS):
        time.sleep(HEARTBEAT_SECONDS)
        if path.stat().st_mtime_ns != before:
            return True
    return False
