"""The compiler of chips that are not here, in a process of its own."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from rwkv7_jax.plan.chips import Target
from rwkv7_jax.runs.exit_codes import OutOfMemory, is_out_of_memory

# The module that shows whether a compiler is installed, and what installs it.
_INSTALLED = {
    "libtpu": ("libtpu", "rwkv7_jax[tpu]"),
    "jax-cuda13-plugin": ("jax_plugins.xla_cuda13", "rwkv7_jax[cuda]"),
}

# The process that compiles.
_CHILD = ("-m", "rwkv7_jax.plan.child")

_ENVIRONMENT = {
    # The devices of this machine are neither needed nor taken.
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    # Compiling takes no chip, so that it need not wait for who has one.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}

# How the second user of libtpu on a machine is turned away, and seconds until it asks again.
_BUSY = "multi-process lockfile"
_WAIT = 3.0

# How Python begins to tell of an exception.
_TRACEBACK = "Traceback (most recent call last):\n"

# The exceptions of JAX that have a compiler's words.
_OF_COMPILER = "JaxRuntimeError"

# The exceptions that may say that memory ran out.
_OF_MEMORY = ("MemoryError", "RuntimeError")

# The most letters of what a compiler says that a sentence quotes.
_REASON = 300


class NoCompiler(RuntimeError):
    """A compiler that is not installed, is busy for too long, or gives no answer in time."""


class CompilerFailure(RuntimeError):
    """A compiler that refuses a step or breaks, and not because memory is too small."""


def compile_elsewhere(
    target: Target, request: dict[str, Any], *, timeout: int
) -> dict[str, Any]:
    """Compiles a step in a new process and returns what `child.compile_step` does.

    Args:
        target: chips to compile for.
        request: what `child.main` reads.
        timeout: seconds until the process is killed, waiting for the compiler included.

    Raises:
        NoCompiler: there is no answer to be had.
        OutOfMemory: this machine has too little memory to compile the step.
        CompilerFailure: the compiler fails for another reason.
        ValueError: the settings do not fit the chips.
        RuntimeError: the process fails; the message has the end of what it said.
    """
    _require_installed(target)
    end = time.monotonic() + timeout
    command = [sys.executable, *_CHILD]
    while True:
        try:
            # `run` kills the process when it leaves early. A compiler heeds no other signal.
            done = subprocess.run(
                command,
                env=os.environ | _ENVIRONMENT,
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=max(end - time.monotonic(), 0.1),
            )
        except subprocess.TimeoutExpired:
            raise NoCompiler(
                f"no answer from {target.compiler} within {timeout} seconds; raise `--timeout`."
            ) from None
        if done.returncode == 0:
            return json.loads(done.stdout)
        if _BUSY not in done.stderr:
            raise _failure(target, done)
        if time.monotonic() + _WAIT >= end:
            raise NoCompiler(
                f"another process has held libtpu for {timeout} seconds; try again later."
            )
        time.sleep(_WAIT)


def _failure(target: Target, done: subprocess.CompletedProcess) -> Exception:
    """Makes the error of a process that failed."""
    said = _exception_line(done.stderr)[:_REASON]
    # Linux kills without a word who asks for more memory than there is.
    killed = done.returncode == -signal.SIGKILL
    # A chip's memory that is too small is an answer, so it was this machine's that ran out.
    if killed or _says_out_of_memory(said, done):
        reason = "killed by the system" if killed else said
        return OutOfMemory(
            f"this machine's memory was not enough to compile for {target.name}, whatever the "
            f"chip has; free some of it, or plan on a larger machine ({reason})."
        )
    kind, _, words = said.partition(": ")
    if kind.endswith(_OF_COMPILER) or done.returncode < 0:
        return CompilerFailure(
            f"{target.compiler} failed to compile the step for {target.name}, and not for want of "
            f"memory ({words or said})."
        )
    if kind == ValueError.__name__:
        return ValueError(words)
    return RuntimeError(f"compiling failed: {said}\n{_ending(done)}")


def _says_out_of_memory(said: str, done: subprocess.CompletedProcess) -> bool:
    """Tells whether a process says that memory ran out.

    Args:
        said: the first line of the exception that ended it.
        done: the process.
    """
    if done.returncode < 0:
        # C++ may say more than its last line.
        return is_out_of_memory(RuntimeError(_ending(done)))
    kind = said.partition(": ")[0]
    # The message of another exception may have a path of the user's.
    if _TRACEBACK in done.stderr and not kind.endswith(_OF_MEMORY):
        return False
    return kind == MemoryError.__name__ or is_out_of_memory(RuntimeError(said))


def _ending(done: subprocess.CompletedProcess) -> str:
    """Returns the end of what a process wrote to stderr."""
    return done.stderr[-3000:]


def _exception_line(text: str) -> str:
    """Returns the first line of the exception that ended a process; its last line without one.

    Args:
        text: what the process wrote to stderr.
    """
    _, found, ending = text.rpartition(_TRACEBACK)
    lines = ending.strip("\n").splitlines() or [""]
    if found:
        for line in lines:
            # The calls before it are indented.
            if not line.startswith(" "):
                return line
    return lines[-1]


def _require_installed(target: Target) -> None:
    module, package = _INSTALLED[target.compiler]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise NoCompiler(
            f"{target.compiler} is not installed, which compiles for {target.name}: "
            f"pip install '{package}'."
        )
