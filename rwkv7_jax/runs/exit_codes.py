"""Errors that end a program of runs, and the exit code of each.

0 done, or saved on a signal; 2 bad settings or data; 3 no valid checkpoint; 4 stopped because
numbers were not finite; 5 disk; 6 another process of the run was lost.
"""

import errno
import sys

_DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO}

_USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


class NoValidCheckpoint(RuntimeError):
    """A run that has checkpoints, all of them damaged."""


class NotFinite(RuntimeError):
    """Too many updates in a row whose loss or gradient was not finite."""


class DiskError(OSError):
    """Something that must be kept and could not be written."""


class EndedElsewhere(RuntimeError):
    """The end of a run that process 0 decided on.

    Attributes:
        code: the exit code.
    """

    def __init__(self, reason: str, code: int):
        """Takes the reason and the exit code of process 0."""
        super().__init__(reason)
        self.code = code


class Stopped(BaseException):
    """A signal that asked the run to end; like KeyboardInterrupt it passes `except Exception`."""


def warn(text: str) -> None:
    """Prints a warning to stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def exit_code(error: BaseException) -> int | None:
    """Returns the exit code of an error, or None for a bug, which should show its traceback."""
    if isinstance(error, Stopped):
        return 0
    if isinstance(error, EndedElsewhere):
        return error.code
    if isinstance(error, NoValidCheckpoint):
        return 3
    if isinstance(error, NotFinite):
        return 4
    # Before the classes below: for a lost process JAX also raises ValueError, which is code 2.
    if _is_lost_process(error):
        return 6
    if isinstance(error, DiskError):
        return 5
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return 5
    return 2 if isinstance(error, _USER_ERRORS) else None


def _is_lost_process(error: BaseException) -> bool:
    # JAX (0.10.2) has no class of its own for this, and raises ValueError as well.
    # Gloo is what CPU processes talk through; on other platforms JAX ends the process itself.
    return "Gloo" in str(error)
