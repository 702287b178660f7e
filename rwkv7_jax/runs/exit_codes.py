"""Errors that end a program of runs, and the exit code of each.

0 done, or saved on a signal where `--stopped_code` names no code for that; 2 bad settings or data;
3 no valid checkpoint; 4 stopped because numbers were not finite; 5 disk; 6 another process of the
run was lost; 7 out of memory; 75 another process works there; 130 Ctrl-C.
"""

import errno
import re
import sys

import jax

from rwkv7_jax.checks import escape_controls, first_line

_DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO}

# The same in the words of libraries whose errors have no number, in small letters. TensorStore's
# begin with RESOURCE_EXHAUSTED where a disk is full, as XLA's do where memory is.
_DISK_SIGNS = (
    "no space left on device",
    "file too large",
    "disk quota exceeded",
    "read-only file system",
    "input/output error",
)

# What allocators of the host's memory say, in small letters: C++, the operating system, NumPy.
_OUT_OF_HOST_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "cannot allocate memory",
    "unable to allocate",
)

# The same of all: XLA on every platform; CUDA and its libraries; TPU.
_OUT_OF_MEMORY = (
    *_OUT_OF_HOST_MEMORY,
    "resource_exhausted",
    "resource exhausted",
    "out of memory",
    "out_of_memory",
    "cudaerrormemoryallocation",
    "ran out of memory",
    "exceeded hbm capacity",
    "failed to allocate",
)

# How the collectives of CPU processes say that one of them is gone: "Gloo all-reduce failed: ...".
_LOST_PROCESS = re.compile(r"\bGloo [\w -]+ failed\b")

# Paths and other words of the user's, as messages have them.
_QUOTED = re.compile(r"`[^`]*`|\"[^\"]*\"")

# What `sysexits.h` calls a temporary failure.
_LATER = 75

# Exit codes without a meaning here, or with that of "later"; from 126 on they are the shell's.
_FREE_CODES = (8, 125)

_USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


class InUse(ValueError):
    """A folder or a store in which another process works, which may end at any time."""


class NoValidCheckpoint(RuntimeError):
    """A run that has checkpoints, all of them damaged."""


class NotFinite(RuntimeError):
    """Too many updates in a row whose loss or gradient was not finite."""


class DiskError(OSError):
    """Something that must be kept and could not be written."""


class OutOfMemory(RuntimeError):
    """A device, or the host, that has no room for an array."""


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
    """A signal that asked the run to end; like KeyboardInterrupt it passes `except Exception`.

    Attributes:
        code: the exit code.
    """

    def __init__(self, reason: str, code: int = 0):
        """Takes the reason and the exit code."""
        super().__init__(reason)
        self.code = code


def check_stopped_code(code: int) -> int:
    """Returns the exit code of stopped runs that `--stopped_code` names.

    Raises:
        ValueError: it means something else already.
    """
    if code != 0 and not _FREE_CODES[0] <= code <= _FREE_CODES[1]:
        raise ValueError(
            f"`--stopped_code` must be 0 or lie between {_FREE_CODES[0]} and {_FREE_CODES[1]}; "
            f"got {code}."
        )
    return code


def warn(text: str) -> None:
    """Prints a warning to stderr."""
    # None where it was closed before the program began; `print` would take stdout in its place.
    if sys.stderr is not None:
        text = escape_controls(text)
        print(f"warning: {text}", file=sys.stderr, flush=True)


def exit_code(error: BaseException) -> int | None:
    """Returns the exit code of an error, or None for a bug, which should show its traceback."""
    if isinstance(error, Stopped | EndedElsewhere):
        return error.code
    if isinstance(error, NoValidCheckpoint):
        return 3
    if isinstance(error, NotFinite):
        return 4
    if isinstance(error, InUse):
        return _LATER
    # Before the classes below: for a lost process JAX also raises ValueError, which is code 2.
    if _is_lost_process(error):
        return 6
    if is_out_of_memory(error):
        return 7
    if isinstance(error, KeyboardInterrupt):
        return 130
    if is_disk_error(error):
        return 5
    return 2 if isinstance(error, _USER_ERRORS) else None


def is_disk_error(error: BaseException) -> bool:
    """Tells whether an error is that a disk has no room, cannot be written or fails."""
    if isinstance(error, DiskError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _DISK_ERRORS
    is_of_library = isinstance(error, ValueError | RuntimeError | OSError)
    return is_of_library and _says(error, _DISK_SIGNS)


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an error, or one that it was raised from, is that memory ran out.

    No class tells: JAX raises its one class of run-time errors, with the allocator's text.
    """
    if is_disk_error(error):
        return False
    return _is_of(error, (MemoryError, OutOfMemory), _OUT_OF_MEMORY)


def is_out_of_host_memory(error: BaseException) -> bool:
    """Tells whether the memory that ran out is this machine's rather than an accelerator's."""
    return _is_of(error, (MemoryError,), _OUT_OF_HOST_MEMORY)


def _is_of(
    error: BaseException, kinds: tuple[type[BaseException], ...], signs: tuple[str, ...]
) -> bool:
    """Tells whether an error, or one that it was raised from, is of a kind or has a sign."""
    cause: BaseException | None = error
    # A chain of errors may be circular.
    for _ in range(10):
        if cause is None:
            return False
        if isinstance(cause, kinds):
            return True
        if _is_of_allocator(cause) and _says(cause, signs):
            return True
        cause = cause.__cause__
    return False


def _is_of_allocator(error: BaseException) -> bool:
    """Tells whether an error may have an allocator's words rather than a path of the user's."""
    if type(error).__module__.startswith(f"{__name__.partition('.')[0]}."):
        return False
    if isinstance(error, OSError):
        return error.errno in (None, errno.ENOMEM)
    return isinstance(error, RuntimeError)


def _says(error: BaseException, signs: tuple[str, ...]) -> bool:
    """Tells whether a message has a sign outside of what it quotes."""
    text = _QUOTED.sub("", str(error)).lower()
    return any(sign in text for sign in signs)


def memory_sentence(error: BaseException, changes: str) -> str:
    """Returns the sentence of a program that ran out of memory.

    Args:
        error: of the allocator.
        changes: what to change, after a semicolon and without a full stop.
    """
    return f"out of memory ({first_line(error)}); {changes}."


def _is_lost_process(error: BaseException) -> bool:
    """Tells whether an error is that another process of the run is gone."""
    # JAX (0.10.2) has no class of its own for this, and raises ValueError as well.
    # Gloo is what CPU processes talk through; on other platforms JAX ends the process itself.
    if not isinstance(error, RuntimeError | ValueError):
        return False
    is_joined = jax.distributed.is_initialized()
    return is_joined and _LOST_PROCESS.search(str(error)) is not None
