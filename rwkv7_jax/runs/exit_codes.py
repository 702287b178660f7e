"""How a program of runs ends: its exit codes, with the reason as the last line on stderr.

0 done, or saved on a signal; 2 bad settings or data; 3 no valid checkpoint; 4 stopped because
numbers were not finite; 5 the disk; 6 another process of the run was lost.
"""

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator

_DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO}


class NoValidCheckpoint(RuntimeError):
    """A run has checkpoints and none of them is whole."""


class NotFinite(RuntimeError):
    """Too many updates in a row had a loss or gradient that was not finite."""


class DiskError(OSError):
    """What must be kept could not be written."""


class EndedElsewhere(RuntimeError):
    """The first of several processes ended the run."""

    def __init__(self, reason: str, code: int):
        """Why, and with which exit code."""
        super().__init__(reason)
        self.code = code


class Stopped(BaseException):
    """A signal asked the run to end; like KeyboardInterrupt, no `except Exception` takes it."""


def warn(text: str) -> None:
    """A line on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def exit_code(error: BaseException) -> int | None:
    """The exit code that an error stands for; None for one that is a fault of the program."""
    if isinstance(error, Stopped):
        return 0
    if isinstance(error, EndedElsewhere):
        return error.code
    if isinstance(error, NoValidCheckpoint):
        return 3
    if isinstance(error, NotFinite):
        return 4
    if "Gloo" in str(error):  # what CPUs that make one run talk through; JAX has no class for it
        return 6
    if isinstance(error, DiskError) or (isinstance(error, OSError) and error.errno in _DISK):
        return 5
    return 2 if isinstance(error, ValueError | TypeError | OSError | ImportError) else None


@contextlib.contextmanager
def exit_with_code(program: str) -> Iterator[None]:
    """Errors that users cause end the program in one line; others keep their traceback.

    What has been told is not told again: reads and writes that fail leave futures and coroutines
    behind, which complain when they are collected, at any time up to behind the program's reason.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _tell_what_is_new
    try:
        yield
    except BaseException as error:
        code = exit_code(error)
        if code is None:
            raise
        sys.stdout.flush()
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        sys.exit(code)


def _tell_what_is_new(unraisable) -> None:
    source = getattr(unraisable.object, "cr_code", None)
    forsaken = source is not None and "/orbax/" in source.co_filename
    if not forsaken and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


class _Quiet:
    """A text stream that falls silent, for good, when nobody reads it any more."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _silenced(self, call, *arguments):
        try:
            return call(*arguments)
        except BrokenPipeError:
            # Python flushes again when it ends: the descriptor itself has to lead nowhere.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            return len(arguments[0]) if arguments else None

    def write(self, text: str) -> int:
        """As the stream's, until it breaks."""
        return self._silenced(self._stream.write, text)

    def flush(self) -> None:
        """As the stream's, until it breaks."""
        self._silenced(self._stream.flush)


def ignore_broken_pipe() -> None:
    """Output goes on into nothing when the pipe that it went into is closed: a run does not end."""
    sys.stdout, sys.stderr = _Quiet(sys.stdout), _Quiet(sys.stderr)
