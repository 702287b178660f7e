"""Signals that end a run in good order."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

from rwkv7_jax.runs.exit_codes import Stopped

_NAMES = ("SIGTERM", "SIGINT", "SIGHUP")

# Longer than any step in between may take; within the five seconds that a run has to leave.
_GRACE = 3.0


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP become a request that a loop looks at; a further SIGINT kills.

    Python runs its handlers between two of its own instructions, which a compilation may put off
    for minutes. So a thread watches as well: it leaves at once at the second SIGINT, and soon where
    the loop does not come to look while nothing is to be saved.

    Attributes:
        requested: the first signal's name; empty before.
        unsaved: whether updates have been made that are on no disk.
        vote: from whether there is a request here to whether the run shall end: several processes
            have to do so behind the same step.
    """

    def __init__(self):
        """Nothing has been requested; `with` listens."""
        self.requested, self.unsaved, self.vote = "", False, bool
        self._seen, self._at_once = threading.Event(), False

    def __enter__(self) -> "StopSignals":
        """Signals are requests from here on."""
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old = {}
        for name in _NAMES:
            number = getattr(signal, name)
            # A run under nohup shall stay deaf to SIGHUP.
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._handle)
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *error) -> None:
        """Signals are what they were before."""
        signal.set_wakeup_fd(self._old_wakeup)
        for number, old in self._old.items():
            signal.signal(number, old)
        self._seen.set()
        self._writer.close()
        self._watcher.join()
        self._reader.close()

    def _handle(self, number: int, frame) -> None:
        self.requested = self.requested or signal.Signals(number).name
        if self._at_once:
            self._raise()

    def _raise(self) -> None:
        self._seen.set()
        raise Stopped(f"stopped by {self.requested}.")

    def _watch(self) -> None:
        """The thread: one byte a signal."""
        requests = 0
        while received := self._reader.recv(1):
            requests += 1
            if requests > 1 and received[0] == signal.SIGINT:
                _leave(130, "left at once; the newest checkpoint is what counts.")
            if requests == 1:
                threading.Thread(target=self._leave_if_idle, daemon=True).start()

    def _leave_if_idle(self) -> None:
        if not self._seen.wait(_GRACE) and not self.unsaved:
            _leave(0, f"stopped by {self.requested}; nothing was left to save.")

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A signal ends the block at once, also one that came before it, by raising `Stopped`.

        Raises:
            Stopped: there is a request.
        """
        self._at_once = True
        try:
            if self.requested:
                self._raise()
            yield
        finally:
            self._at_once = False

    def seen(self) -> bool:
        """Whether the caller is about to save and end."""
        if not self.vote(bool(self.requested)):
            return False
        self.requested = self.requested or "a signal to another process"
        self._seen.set()
        return True


def _leave(code: int, reason: str) -> None:
    """The process is gone, without any clearing up."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os.write(2, f"\n{os.path.basename(sys.argv[0])}: {reason}\n".encode())
    os._exit(code)
