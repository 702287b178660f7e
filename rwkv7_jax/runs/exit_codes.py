"""Errors that end a program, and the exit code of each.

* 0: done, or saved on a signal (for the latter `--stopped_code` may name another code)
* 2: bad settings or data
* 3: no valid checkpoint
* 4: stopped after non-finite updates
* 5: disk error
* 6: another process of the run was lost
* 7: out of memory
* 75: another process uses the folder, the store, the TPU or the GPU
* 130: Ctrl-C
"""

import errno
import re
import sys

import jax

from rwkv7_jax.checks import escape_controls, first_line
from rwkv7_jax.runs.monitoring.progress_bar import end_open_line

_DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO}

# The same errors in lower-case words, from libraries whose errors have no number. TensorStore's
# message for a full disk begins with RESOURCE_EXHAUSTED, as XLA's does for full memory.
_DISK_PHRASES = (
    "no space left on device",
    "file too large",
    "disk quota exceeded",
    "read-only file system",
    "input/output error",
)

# Lower-case words of the allocators of host memory: C++, the operating system, NumPy.
_OUT_OF_HOST_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "cannot allocate memory",
    "unable to allocate",
)

# Lower-case words of all allocators: also XLA on every platform, CUDA and its libraries, TPU.
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

# How the collectives of CPU processes report a lost process: "Gloo all-reduce failed: ...".
_LOST_PROCESS = re.compile(r"\bGloo [\w -]+ failed\b")

# Quoted text in messages, such as paths.
_QUOTED = re.compile(r"`[^`]*`|\"[^\"]*\"")

# A temporary failure (EX_TEMPFAIL) in `sysexits.h`.
_LATER = 75

# The range of `--stopped_code`: codes without a meaning here, and _LATER. Shells use 126 and above.
_FREE_CODES = (8, 125)

_USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


class InUse(ValueError):
    """A folder, a store or a device that another process uses; a later attempt may succeed."""


class NoValidCheckpoint(RuntimeError):
    """A run whose checkpoints are all damaged."""


class NotFinite(RuntimeError):
    """Too many consecutive updates with a non-finite loss or gradient."""


class DiskError(OSError):
    """A failure to write data that must be kept."""


class OutOfMemory(RuntimeError):
    """A device or host without enough memory for an array."""


class EndedElsewhere(RuntimeError):
    """An error in another process of the run, which ends this process too.

    Attributes:
        code: the exit code.
    """

    def __init__(self, reason: str, code: int):
        """Takes the reason and the exit code of the other process."""
        super().__init__(reason)
        self.code = code


class Stopped(BaseException):
    """A signal that asked the run to end; `except Exception` does not catch it.

    Attributes:
        code: the exit code.
    """

    def __init__(self, reason: str, code: int = 0):
        """Takes the reason and the exit code."""
        super().__init__(reason)
        self.code = code


def check_stopped_code(code: int) -> int:
    """Checks and returns the exit code of stopped runs that `--stopped_code` names.

    Raises:
        ValueError: the code has another meaning.
    """
    if code != 0 and not _FREE_CODES[0] <= code <= _FREE_CODES[1]:
        raise ValueError(
            f"`--stopped_code` must be 0 or lie between {_FREE_CODES[0]} and {_FREE_CODES[1]}; "
            f"got {code}."
        )
    return code


def warn(text: str) -> None:
    """Prints a warning to stderr."""
    # stderr is None if it was closed before the program began; `print` would write to stdout.
    if sys.stderr is not None:
        end_open_line()
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
    # Before the classes below: for a lost process JAX may raise ValueError, which is code 2.
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
    """Returns whether an error means that a disk is full, cannot be written, or fails."""
    if isinstance(error, DiskError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _DISK_ERRORS
    is_of_library = isinstance(error, ValueError | RuntimeError | OSError)
    return is_of_library and _has_phrase(error, _DISK_PHRASES)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error, or an error that caused it, means that memory ran out.

    The class of an error is not enough: JAX raises its one class of run-time errors, with the
    allocator's text.
    """
    if is_disk_error(error):
        return False
    return _is_any_cause(error, (MemoryError, OutOfMemory), _OUT_OF_MEMORY)


def is_out_of_host_memory(error: BaseException) -> bool:
    """Returns whether the host ran out of memory, rather than an accelerator."""
    return _is_any_cause(error, (MemoryError,), _OUT_OF_HOST_MEMORY)


def _is_any_cause(
    error: BaseException,
    classes: tuple[type[BaseException], ...],
    phrases: tuple[str, ...],
) -> bool:
    """Returns whether an error, or an error that caused it, has one of the classes or phrases."""
    cause: BaseException | None = error
    # A chain of errors may be circular.
    for _ in range(10):
        if cause is None:
            return False
        if isinstance(cause, classes):
            return True
        if _may_quote_allocator(cause) and _has_phrase(cause, phrases):
            return True
        cause = cause.__cause__
    return False


def _may_quote_allocator(error: BaseException) -> bool:
    """Returns whether the text of an error may come from an allocator."""
    if type(error).__module__.startswith(f"{__name__.partition('.')[0]}."):
        return False
    if isinstance(error, OSError):
        return error.errno in (None, errno.ENOMEM)
    return isinstance(error, RuntimeError)


def _has_phrase(error: BaseException, phrases: tuple[str, ...]) -> bool:
    """Returns whether a message contains one of the phrases outside its quotes."""
    text = _QUOTED.sub("", str(error)).lower()
    return any(phrase in text for phrase in phrases)


def memory_sentence(error: BaseException, changes: str) -> str:
    """Returns the message of a program that ran out of memory.

    Args:
        error: the allocator's error.
        changes: what to change, without a full stop.
    """
    return f"out of memory ({first_line(error)}); {changes}."


def _is_lost_process(error: BaseException) -> bool:
    """Returns whether an error means that another process of the run is gone."""
    # JAX (0.10.2) has no class for this error and may raise ValueError.
    # CPU processes communicate through Gloo; on other platforms JAX ends the process itself.
    if not isinstance(error, RuntimeError | ValueError):
        return False
    is_joined = jax.distributed.is_initialized()
    return is_joined and _LOST_PROCESS.search(str(error)) is not None
