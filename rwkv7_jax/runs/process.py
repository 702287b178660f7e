"""Side effects of train.py and eval.py on their process: signals, exit codes, streams and hooks.

`main` installs all of them once, with `program`. The rest of the package never replaces a hook, a
stream or a signal handler: it raises the errors of `exit_codes` and asks `StopSignals.should_stop`.
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

# Seconds that the loop has to notice a signal: longer than one step should take, and within the
# five seconds after which cluster schedulers begin to kill.
_GRACE_SECONDS = 3.0

# Seconds after which a signal's handler runs again if what it raised was dropped.
_AGAIN_SECONDS = 0.05

_LESS_MEMORY = (
    "lower `config.data.batch_size`, `config.data.length`, `config.evaluation.length` or "
    '`config.evaluation.windows`, set `config.model.remat` to "block", raise '
    "`config.optimizer.accumulate`, or use a mesh of more devices"
)

# Seconds that process 0 gives the others to say why they end.
_LAST_WORDS_SECONDS = 1.0


@contextlib.contextmanager
def program(name: str, *, less_memory: str = _LESS_MEMORY) -> Iterator[None]:
    """Runs the body of `main` with every side effect on the process in place.

    The stream proxies and the hook stay installed when the block ends: Python flushes the streams
    and collects the remains of failed reads only after that.

    Args:
        name: how the last line on stderr begins, such as "train.py".
        less_memory: what to change where memory ran out.

    Raises:
        SystemExit: the user caused an error; the code is from `exit_codes`.
    """
    # Orbax logs every save and restore at lower levels.
    absl_logging.set_verbosity(absl_logging.ERROR)
    open_closed_streams()
    escape_unencodable()
    ignore_broken_pipe()
    ignore_abandoned_reads()
    warn_in_one_line()
    # In this order: `exit_on_failure` has to see the SystemExit that `exit_with_code` raises.
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
    that C++ code writes to descriptor 2 end up in that file. Python's own stream is None then, and
    `print(file=None)` would write to the other one.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # It gets the lowest free descriptor, which is this one.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


@contextlib.contextmanager
def exit_with_code(name: str, *, less_memory: str = _LESS_MEMORY) -> Iterator[None]:
    """Ends the program in one line and with an exit code where the user can mend the cause.

    Args:
        name: how that line begins.
        less_memory: what to change where memory ran out.

    Raises:
        SystemExit: an error that has an exit code. Others keep their traceback.
    """
    try:
        yield
    # Also `Stopped` and KeyboardInterrupt, which are no `Exception`.
    except BaseException as error:
        code = exit_code(error)
        if code is None:
            raise
        _flush(sys.stdout)
        if sys.stderr is not None:
            print(
                f"{name}: {_sentence(error, less_memory)}", file=sys.stderr, flush=True
            )
        sys.exit(code)


def _sentence(error: BaseException, less_memory: str) -> str:
    """Returns the last line of a program that ends with an error."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted."
    if is_out_of_memory(error) and not isinstance(error, OutOfMemory):
        return memory_sentence(error, less_memory)
    return escape_controls(str(error))


def _flush(stream: Any) -> None:
    """Flushes a stream; one that was closed before the program began is None."""
    if stream is not None:
        stream.flush()


@contextlib.contextmanager
def exit_on_failure() -> Iterator[None]:
    """Exits with `os._exit` where Python's own clean-up would hang or crash.

    * One of several processes fails: the `atexit` hook of JAX (0.10.2) waits at a barrier for the
      others, which wait for this process in a collective operation.
    * A signal interrupted a compilation: XLA's threads still run, and crash when the interpreter
      frees what they use (jaxlib 0.10.2).
    """
    try:
        yield
    # SystemExit from `exit_with_code` is the usual case here.
    except BaseException as error:
        distributed = jax.distributed.is_initialized()
        # The SystemExit was raised while `Stopped` was handled, which Python notes as its context.
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
            # Process 0 is also the coordinator. Once it is gone JAX aborts the others, which in
            # most cases are about to end for the same reason and can still say it.
            time.sleep(_LAST_WORDS_SECONDS)
        os._exit(code)


def ignore_abandoned_reads() -> None:
    """Hides the complaints about what a failed Orbax read leaves; see `hide_abandoned_reads`."""
    hide_abandoned_reads()
    # Of coroutines that were never even started. The programs have none of their own.
    warnings.filterwarnings(
        "ignore", message="coroutine .* was never awaited", category=RuntimeWarning
    )


def warn_in_one_line() -> None:
    """Shows warnings for users as one line, without the place in the code that gave them."""
    of_python = warnings.formatwarning

    def one_line(message, category, *place: Any, **text: Any) -> str:
        if category is UserWarning:
            return f"warning: {escape_controls(str(message))}\n"
        return of_python(message, category, *place, **text)

    warnings.formatwarning = one_line


# How writes to a stream fail: its reader is gone, the terminal is gone (EIO), the disk that it was
# redirected to is full, or somebody closed it (ValueError).
_LOST_STREAM = (OSError, ValueError)


class _QuietStream:
    """A text stream that swallows failing writes and writes to /dev/null from then on."""

    def __init__(self, stream: TextIO):
        """Wraps a stream that has a file descriptor."""
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _discard(self) -> None:
        # Python flushes once more when it exits: the descriptor itself has to lead nowhere.
        with (
            contextlib.suppress(*_LOST_STREAM),
            open(os.devnull, "w", encoding="utf-8") as nowhere,
        ):
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def write(self, text: str) -> int:
        """Writes the text, or drops it once the stream has no reader."""
        try:
            return self._stream.write(text)
        # Once is enough: from here on the descriptor leads to /dev/null and no write fails.
        except _LOST_STREAM:
            self._discard()
            return len(text)

    def flush(self) -> None:
        """Flushes the stream, or does nothing once it has no reader."""
        try:
            self._stream.flush()
        except _LOST_STREAM:
            self._discard()


def escape_unencodable() -> None:
    """Shows characters that a terminal's encoding lacks as escapes.

    Otherwise a sample with a Chinese character would end a run on a terminal of cp1252.
    """
    for stream in (sys.stdout, sys.stderr):
        # Streams that a test or another program put in place may not have it.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def shown_on(stream: TextIO, text: str) -> str:
    """Returns a text that others or a model wrote as a stream should get it.

    A terminal would obey the controls in it, so they are escaped there; files and pipes get the
    text as it is.
    """
    return escape_controls(text) if stream.isatty() else text


def ignore_broken_pipe() -> None:
    """Lets the program go on when the pipe that its output goes into is closed.

    A run must not end because `| head` has seen enough. Ignoring SIGPIPE does not help: Python
    ignores it already, and raises BrokenPipeError instead.
    """
    sys.stdout = _QuietStream(sys.stdout)
    sys.stderr = _QuietStream(sys.stderr)


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP as a request that the training loop asks for.

    The loop says whether it has unsaved updates, and asks `should_stop` after each step. A second
    SIGINT ends the process at once. A program without a loop is all `interruptible`.

    Python runs signal handlers only between two of its own instructions, and a compilation is one
    long instruction. So a thread watches, too: it ends the process at a second SIGINT, and also
    where nothing has to be saved and the loop does not ask in time. A handler may also run inside a
    callback of the garbage collector (JAX has one), where Python drops what it raises: it is raised
    once more. (The preemption service of JAX 0.10.2 notices no signal in a run of one process.)

    Attributes:
        requested: the name of the first signal; empty before.
        has_unsaved_updates: whether updates have been made that are on no disk yet.
    """

    def __init__(self, code: int | None = 0):
        """Starts without a request; `with` begins to listen.

        Args:
            code: with which a run that was stopped exits; None for 128 and the signal's number, as
                shells count.
        """
        self._code = code
        self.requested = ""
        self.has_unsaved_updates = False
        self._raise_at_once = False
        self._noticed = threading.Event()
        # `bool` gives a flag back as it is: one process decides for itself.
        self._agree: Callable[[bool], bool] = bool

    def __enter__(self) -> "StopSignals":
        """Installs the handlers and starts the thread."""
        self._reader, self._writer = socket.socketpair()
        # `set_wakeup_fd` demands it: a signal handler in C must never block.
        self._writer.setblocking(False)
        self._old_handlers: dict[int, Any] = {}
        for name in _SIGNALS:
            number = getattr(signal, name)
            # A run under nohup has to stay deaf to SIGHUP.
            if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._old_handlers[number] = signal.signal(number, self._handle)
        # Python writes a byte per signal into this socket from C, however busy its main thread is.
        writer = self._writer.fileno()
        self._old_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._old_hook = sys.unraisablehook
        sys.unraisablehook = self._repeat_dropped
        # A daemon: a thread that waits for signals must not keep the process alive.
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *error) -> None:
        """Puts the old handlers back."""
        sys.unraisablehook = self._old_hook
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._noticed.set()
        # The thread's `recv` returns nothing once the other end is closed, which ends its loop.
        self._writer.close()
        self._watcher.join()
        self._reader.close()

    def agree_with(self, vote: Callable[[bool], bool]) -> None:
        """Lets several processes decide together, so that all stop after the same step.

        Args:
            vote: from whether this process wants to stop to whether all do, as `AnyProcess`.
        """
        self._agree = vote

    def should_stop(self) -> bool:
        """Tells whether to save and end now."""
        if not self._agree(bool(self.requested)):
            return False
        # The vote of another process: this one has had no signal of its own.
        self.requested = self.requested or "a signal to another process"
        self._noticed.set()
        return True

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Lets a signal end the block at once, also one that came before it.

        Raises:
            Stopped: there is a request.
        """
        # Set before the test, so that a signal between the two lines is not lost.
        self._raise_at_once = True
        try:
            if self.requested:
                raise self.stopped()
            yield
        except Stopped:
            # Here and not where it is raised: there it may be dropped.
            self._noticed.set()
            raise
        finally:
            self._raise_at_once = False

    def _repeat_dropped(self, unraisable: Any) -> None:
        """Lets the handler run again after it raised in vain; the body of `sys.unraisablehook`."""
        if not isinstance(unraisable.exc_value, Stopped):
            self._old_hook(unraisable)
            return
        # Later: now it would be dropped again. Not SIGINT, of which a second one ends at once.
        main = threading.main_thread().ident
        again = [main, signal.SIGTERM]
        threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, again).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name
        if self._raise_at_once:
            raise self.stopped()

    def stopped(self, text: str = "") -> Stopped:
        """Makes the error that ends the run.

        Args:
            text: what the user should know besides the signal.
        """
        code = self._code
        if code is None:
            code = 128 + signal.Signals[self.requested]
        return Stopped(f"stopped by {self.requested}{text}.", code)

    def _watch(self) -> None:
        """Reads one byte per signal; the body of the thread."""
        requests = 0
        while received := self._reader.recv(1):
            requests += 1
            # Not a second SIGTERM, which some schedulers send again and again.
            if requests > 1 and received[0] == signal.SIGINT:
                _exit_at_once(
                    130, "left at once; the newest checkpoint is what counts."
                )
            # A thread of its own: this one has to go on reading, for a second SIGINT.
            if requests == 1:
                threading.Thread(
                    target=self._exit_if_ignored, args=[received[0]], daemon=True
                ).start()

    def _exit_if_ignored(self, number: int) -> None:
        noticed = self._noticed.wait(_GRACE_SECONDS)
        if not noticed and not self.has_unsaved_updates:
            # Where no Python has run since, `_handle` has not noted it.
            self.requested = self.requested or signal.Signals(number).name
            end = self.stopped("; nothing was left to save")
            _exit_at_once(end.code, str(end))


@contextlib.contextmanager
def hold_interrupt() -> Iterator[Callable[[], bool]]:
    """Holds the first Ctrl-C of the block back; a second one does what it did before the block.

    Yields:
        A function that tells whether it has come.
    """
    came = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        if came.is_set() and callable(before):
            before(number, frame)
        came.set()

    # The thread of `StopSignals` would take it for a request to end the program.
    wakeup = signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)


def _exit_at_once(code: int, reason: str) -> None:
    """Ends the process from a thread, without clean-up."""
    with contextlib.suppress(OSError):
        _flush(sys.stdout)
    # Not through sys.stderr: the main thread may hold its lock.
    line = f"\n{os.path.basename(sys.argv[0])}: {reason}\n"
    os.write(2, line.encode())
    os._exit(code)
