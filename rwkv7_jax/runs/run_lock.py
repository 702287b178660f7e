"""One process at a time in a folder."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

# The holder touches its file every so many seconds: on other machines nothing else tells its life.
BEAT = 5.0

_BEATS = 3


class RunLock:
    """A file that names the process which works in a folder, held by it until it ends.

    The kernel's lock on the file ends with the process, however it ends. Where another machine
    holds it, or the file system knows no locks, one has to watch for some seconds whether the
    holder still touches it (the two clocks need not agree). The file stays behind empty: taking it
    away would let two others in at once.

    Attributes:
        stale: who held it and is gone without having released it; empty if nobody.
    """

    def __init__(self, path: Path):
        """The lock is held.

        Raises:
            ValueError: another process holds it.
            OSError: the file cannot be written.
        """
        self._path, self.stale = path, ""
        self._file = path.open("a+")
        self._file.seek(0)
        text = self._file.read()
        holder = _holder(text)
        locked = self._lock_in_kernel()
        elsewhere = holder.get("host") != socket.gethostname()
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        doubtful = bool(text) and (elsewhere or locked is None)
        if locked is False or (doubtful and _touched(path, who)):
            self._file.close()
            raise ValueError(
                f"`{path.parent}` is in use by {who}; wait for it or take another folder."
            )
        self.stale = who if text else ""
        self._write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        self._done = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _lock_in_kernel(self) -> bool | None:
        """Whether the kernel gave the lock; None where it has none to give."""
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
        self._file.flush()

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def release(self) -> None:
        """Others may come."""
        self._done.set()
        with contextlib.suppress(OSError):
            self._write("")
        self._file.close()


def _holder(text: str) -> dict:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _touched(path: Path, who: str) -> bool:
    """Whether the file is touched within the next beats."""
    print(f"waiting {_BEATS * BEAT:.0f} s to see whether {who} still works here", flush=True)
    before = path.stat().st_mtime_ns
    for _ in range(_BEATS):
        time.sleep(BEAT)
        if path.stat().st_mtime_ns != before:
            return True
    return False
