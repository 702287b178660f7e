"""Side effects of train.py and eval.py on their process: signals, exit codes, streams and hooks.

`main` installs all of them once, with `program`. The rest of the package never replaces a hook, a
stream or a signal handler: it raises the errors of `exit_codes` and calls
`StopSignals.should_stop`.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

import jax
from absl import logging as absl_logging

from rwkv7_jax.checkpoints.orbax_import import hide_abandoned_reads
from rwkv7_jax.checks import escape_controls
from rwkv7_jax.runs.exit_codes import (
    OutOfMemory,
    Stopped,
    exit_code,
    is_out_of_memory,
    memory_sentence,
)

_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")

# Seconds that the loop has to notice a signal: longer than one step should take, and shorter than
# the five seconds after which cluster schedulers begin to kill.
_GRACE_SECONDS = 3.0

# Seconds until a signal handler runs again whose exception Python dropped.
_RETRY_SECONDS = 0.05

_LESS_MEMORY = (
    "lower `config.data.batch_size`, `config.data.length`, `config.evaluation.length` or "
    '`config.evaluation.windows`, set `config.model.remat` to "block", raise '
    "`config.optimizer.accumulate`, or use a mesh of more devices"
)

# Seconds that process 0 gives the others to report why they end.
_REPORT_SECONDS = 1.0


@contextlib.contextmanager
def program(name: str, *, less_memory: str = _LESS_MEMORY) -> Iterator[None]:
    """Runs the body of `main` with all side effects on the process installed.

    The stream proxies and the hook stay installed after the block: only then does Python flush the
    streams and collect what failed reads left behind.

    Args:
        name: the beginning of the last line on stderr, such as "train.py".
        less_memory: what to change if memory runs out.

    Raises:
        SystemExit: the user caused an error; the code comes from `exit_codes`.
    """
    # Orbax logs every save and restore at lower levels.
    absl_logging.set_verbosity(absl_logging.ERROR)
    open_closed_streams()
    escape_unencodable()
    write_lines_at_once()
    ignore_broken_pipe()
    ignore_abandoned_reads()
    warn_in_one_line()
    # The order matters: `exit_on_failure` must see the SystemExit that `exit_with_code` raises.
    with (
        exit_on_failure(),
        exit_with_code(name, less_memory=less_memory),
        StopSignals(None) as stop,
        stop.interruptible(),
    ):
        yield


def open_closed_streams() -> None:
    """Opens /dev/null in place of standard streams that were closed before the program began.

    Otherwise the next file that is opened gets the descriptor of the closed stream, and messages
    that C++ code writes to descriptor 2 end up in that file. Python's own stream would be None, and
    `print(file=None)` writes to stdout.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # `os.open` returns the lowest free descriptor, which is this one.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


@contextlib.contextmanager
def exit_with_code(name: str, *, less_memory: str = _LESS_MEMORY) -> Iterator[None]:
    """Turns an error that the user can fix into one line on stderr and an exit code.

    Args:
        name: the beginning of that line.
        less_memory: what to change if memory runs out.

    Raises:
        SystemExit: the error has an exit code. Other errors keep their traceback.
    """
    try:
        yield
    # `Stopped` and KeyboardInterrupt are not subclasses of `Exception`.
    except BaseException as error:
        code = exit_code(error)
        if code is None:
            raise
        _flush(sys.stdout)
        if sys.stderr is not None:
            print(
                f"{name}: {_last_line(error, less_memory)}", file=sys.stderr, flush=True
            )
        sys.exit(code)


def _last_line(error: BaseException, less_memory: str) -> str:
    """Returns the last line of a program that ends with an error."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted."
    if is_out_of_memory(error) and not isinstance(error, OutOfMemory):
        return memory_sentence(error, less_memory)
    return escape_controls(str(error))


def _flush(stream: Any) -> None:
    """Flushes a stream, unless it is None because it was closed before the program began."""
    if stream is not None:
        stream.flush()


@contextlib.contextmanager
def exit_on_failure() -> Iterator[None]:
    """Exits with `os._exit` where Python's own clean-up would hang or crash.

    * If one of several processes fails, the `atexit` hook of JAX (0.10.2) waits at a barrier for
      the others, which wait for this process in a collective.
    * If a signal interrupted a compilation, XLA's threads still run and crash when the interpreter
      frees what they use (jaxlib 0.10.2).
    """
    try:
        yield
    # Usually the SystemExit of `exit_with_code`.
    except BaseException as error:
        distributed = jax.distributed.is_initialized()
        # `exit_with_code` raised the SystemExit while it handled `Stopped`.
        interrupted = isinstance(error.__context__, Stopped | KeyboardInterrupt)
        if not distributed and not interrupted:
            raise
        code = 1
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            code = error.code
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        _flush(sys.stdout)
        _flush(sys.stderr)
        if distributed and jax.process_index() == 0:
            # Process 0 is also the coordinator: when it exits, JAX aborts the others. They usually
            # end for the same reason, and need a moment to report it.
            time.sleep(_REPORT_SECONDS)
        os._exit(code)


def ignore_abandoned_reads() -> None:
    """Hides warnings about what a failed Orbax read leaves; see `hide_abandoned_reads`."""
    hide_abandoned_reads()
    # Orbax's coroutines that never started. The programs have no coroutines of their own.
    warnings.filterwarnings(
        "ignore", message="coroutine .* was never awaited", category=RuntimeWarning
    )


def warn_in_one_line() -> None:
    """Shows warnings for users on one line, without their place in the code."""
    default_format = warnings.formatwarning

    def one_line(message, category, *place: Any, **text: Any) -> str:
        if category is UserWarning:
            return f"warning: {escape_controls(str(message))}\n"
        return default_format(message, category, *place, **text)

    warnings.formatwarning = one_line


# How writes to a stream fail: its reader is gone, the terminal is gone (EIO), the disk that it is
# redirected to is full, or the stream is closed (ValueError).
_LOST_STREAM = (OSError, ValueError)


class _QuietStream:
    """A text stream that ignores a failing write and writes to /dev/null from then on."""

    def __init__(self, stream: TextIO):
        """Wraps a stream that has a file descriptor."""
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _discard(self) -> None:
        # Python flushes again at exit, so the descriptor itself must point to /dev/null.
        with (
            contextlib.suppress(*_LOST_STREAM),
            open(os.devnull, "w", encoding="utf-8") as nowhere,
        ):
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def write(self, text: str) -> int:
        """Writes the text, or drops it if the write fails."""
        try:
            return self._stream.write(text)
        # Happens only once: afterwards the descriptor points to /dev/null.
        except _LOST_STREAM:
            self._discard()
            return len(text)

    def flush(self) -> None:
        """Flushes the stream; ignores a failure."""
        try:
            self._stream.flush()
        except _LOST_STREAM:
            self._discard()


def escape_unencodable() -> None:
    """Escapes characters that the encoding of stdout or stderr lacks.

    Otherwise a sample with a Chinese character would end a run on a cp1252 terminal.
    """
    for stream in (sys.stdout, sys.stderr):
        # A stream that a test or another program installed may lack `reconfigure`.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def write_lines_at_once() -> None:
    """Writes each line of stdout when it is complete, also to a file or a pipe.

    Otherwise the log of a run would lack the newest lines until some kilobytes are together.
    """
    # A stream that a test or another program installed may lack `reconfigure`.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(line_buffering=True)


def shown_on(stream: TextIO, text: str) -> str:
    """Returns untrusted text, such as a model's, in the form that is safe for a stream.

    A terminal would obey control characters, so they are escaped there. Files and pipes get the
    text unchanged.
    """
    return escape_controls(text) if stream.isatty() else text


def ignore_broken_pipe() -> None:
    """Keeps the program running when the reader of its output closes the pipe.

    A run must not end because `| head` has read enough. Ignoring SIGPIPE does not help: Python
    already ignores it, and raises BrokenPipeError instead.
    """
    sys.stdout = _QuietStream(sys.stdout)
    sys.stderr = _QuietStream(sys.stderr)


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP as a stop request that the training loop polls.

    The loop sets `has_unsaved_updates`, and calls `should_stop` after each step. A second SIGINT
    ends the process at once. A program without a loop runs entirely in `interruptible`.

    Python runs signal handlers only between two bytecode instructions, and a compilation is one
    long instruction. So a thread watches too. It ends the process on a second SIGINT, and also if
    there is nothing to save and the loop does not notice the signal in time.

    A handler may run inside a callback of the garbage collector (JAX has one), where Python drops
    the exception that it raises. The handler then runs again.

    The preemption service of JAX 0.10.2 notices no signal in a run of one process.

    Attributes:
        requested: the name of the first signal; empty before.
        has_unsaved_updates: whether there are updates that no checkpoint holds yet.
    """

    def __init__(self, code: int | None = 0):
        """Starts without a request; `with` installs the handlers.

        Args:
            code: the exit code of a stopped run; None for 128 plus the signal's number, as in
                shells.
        """
        self._code = code
        self.requested = ""
        self.has_unsaved_updates = False
        self._raise_at_once = False
        self._noticed = threading.Event()
        # `bool` returns a flag unchanged: a single process decides for itself.
        self._agree: Callable[[bool], bool] = bool

    def __enter__(self) -> "StopSignals":
        """Installs the handlers and starts the thread."""
        self._reader, self._writer = socket.socketpair()
        # `set_wakeup_fd` requires this: a signal handler in C must never block.
        self._writer.setblocking(False)
        self._old_handlers: dict[int, Any] = {}
        for name in _SIGNALS:
            number = getattr(signal, name)
            # Under nohup a run must keep ignoring SIGHUP.
            if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._old_handlers[number] = signal.signal(number, self._handle)
        # Python's C code writes one byte per signal into this socket, even if the main thread is
        # busy.
        writer = self._writer.fileno()
        self._old_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._old_hook = sys.unraisablehook
        sys.unraisablehook = self._repeat_dropped
        # A daemon thread: waiting for signals must not keep the process alive.
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *error) -> None:
        """Restores the previous handlers."""
        sys.unraisablehook = self._old_hook
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._noticed.set()
        # When this end is closed, the thread's `recv` returns nothing and its loop ends.
        self._writer.close()
        self._watcher.join()
        self._reader.close()

    def agree_with(self, vote: Callable[[bool], bool]) -> None:
        """Lets several processes decide together, so that all stop after the same step.

        Args:
            vote: takes whether this process wants to stop and returns, the same in all processes,
                whether to stop; such as `AnyProcess`.
        """
        self._agree = vote

    def should_stop(self) -> bool:
        """Returns whether to save and end now."""
        if not self._agree(bool(self.requested)):
            return False
        # Another process asked to stop: this one received no signal.
        self.requested = self.requested or "a signal to another process"
        self._noticed.set()
        return True

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Lets a signal end the block at once, even a signal that came before the block.

        Raises:
            Stopped: there is a stop request.
        """
        # Set before the check, so that a signal between the two lines is not lost.
        self._raise_at_once = True
        try:
            if self.requested:
                raise self.stopped()
            yield
        except Stopped:
            # Not where it is raised, because Python may drop it there.
            self._noticed.set()
            raise
        finally:
            self._raise_at_once = False

    def _repeat_dropped(self, unraisable: Any) -> None:
        """Runs the handler again if Python dropped its exception; a `sys.unraisablehook`."""
        if not isinstance(unraisable.exc_value, Stopped):
            self._old_hook(unraisable)
            return
        # Not now, because it would be dropped again. Not SIGINT: a second one ends the process.
        main = threading.main_thread().ident
        again = [main, signal.SIGTERM]
        threading.Timer(_RETRY_SECONDS, signal.pthread_kill, again).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name
        if self._raise_at_once:
            raise self.stopped()

    def stopped(self, text: str = "") -> Stopped:
        """Creates the error that ends the run.

        Args:
            text: what to tell the user besides the signal.
        """
        code = self._code
        if code is None:
            code = 128 + signal.Signals[self.requested]
        return Stopped(f"stopped by {self.requested}{text}.", code)

    def _watch(self) -> None:
        """Reads one byte per signal, as the body of the thread."""
        requests = 0
        while received := self._reader.recv(1):
            requests += 1
            # Not a second SIGTERM, which some schedulers send repeatedly.
            if requests > 1 and received[0] == signal.SIGINT:
                _exit_at_once(
                    130, "exited at once; only the newest checkpoint is saved."
                )
            # In another thread, because this one must keep reading for a second SIGINT.
            if requests == 1:
                threading.Thread(
                    target=self._exit_if_ignored, args=[received[0]], daemon=True
                ).start()

    def _exit_if_ignored(self, number: int) -> None:
        noticed = self._noticed.wait(_GRACE_SECONDS)
        if not noticed and not self.has_unsaved_updates:
            # `_handle` has not recorded the signal if no Python instruction has run since.
            self.requested = self.requested or signal.Signals(number).name
            end = self.stopped("; there was nothing to save")
            _exit_at_once(end.code, str(end))


@contextlib.contextmanager
def hold_interrupt() -> Iterator[Callable[[], bool]]:
    """Holds back the first Ctrl-C in the block; a second one calls the previous handler.

    Yields:
        A function that returns whether Ctrl-C was pressed.
    """
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def record(number: int, frame: FrameType | None) -> None:
        if pressed.is_set() and callable(before):
            before(number, frame)
        pressed.set()

    # The thread of `StopSignals` would take Ctrl-C for a request to end the program.
    wakeup = signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, record)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)


def _exit_at_once(code: int, reason: str) -> None:
    """Ends the process from a thread, without clean-up."""
    with contextlib.suppress(*_LOST_STREAM):
        _flush(sys.stdout)
    # Not through sys.stderr: the main thread may hold its lock.
    line = f"\n{os.path.basename(sys.argv[0])}: {reason}\n"
    # The terminal may be gone: after SIGHUP it usually is.
    with contextlib.suppress(OSError):
        os.write(2, line.encode())
    os._exit(code)
