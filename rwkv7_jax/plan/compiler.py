"""Runs the compiler for absent chips in a subprocess."""

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

# For each compiler, the module that shows whether it is installed, and the extra that installs it.
_INSTALLED = {
    "libtpu": ("libtpu", "rwkv7_jax[tpu]"),
    "jax-cuda13-plugin": ("jax_plugins.xla_cuda13", "rwkv7_jax[cuda]"),
}

_CHILD = ("-m", "rwkv7_jax.plan.child")

_ENVIRONMENT = {
    # Leave the devices of this machine alone.
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    # Compiling uses no chip, so it need not wait for the process that has one.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}

# libtpu's error while another process uses it, and the seconds between attempts.
_BUSY = "multi-process lockfile"
_WAIT = 3.0

_TRACEBACK = "Traceback (most recent call last):\n"

# The JAX exception with a compiler's message.
_OF_COMPILER = "JaxRuntimeError"

# The exceptions that may report that memory ran out.
_OF_MEMORY = ("MemoryError", "RuntimeError")

# Most characters of a compiler's message that an error quotes.
_REASON = 300


class NoCompiler(RuntimeError):
    """The compiler is not installed, is busy for too long, or times out."""


class CompilerFailure(RuntimeError):
    """The compiler rejects a step or crashes, for a reason other than too little memory."""


def compile_elsewhere(
    target: Target, request: dict[str, Any], *, timeout: int
) -> dict[str, Any]:
    """Compiles a step in a new process and returns the result of `child.compile_step`.

    Args:
        target: chips to compile for.
        request: input of `child.main`.
        timeout: seconds until the process is killed, including the wait for the compiler.

    Raises:
        NoCompiler: the compiler is unavailable or times out.
        OutOfMemory: this machine has too little memory to compile the step.
        CompilerFailure: the compiler fails for another reason.
        ValueError: the settings do not fit the chips.
        RuntimeError: the process fails; the message has the end of its stderr.
    """
    _require_installed(target)
    end = time.monotonic() + timeout
    command = [sys.executable, *_CHILD]
    while True:
        try:
            # On a timeout `run` sends SIGKILL, the only signal that ends a compiler.
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
                f"{target.compiler} gave no answer within {timeout} seconds; raise `--timeout`."
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
    # Linux kills a process without a message if memory runs out.
    killed = done.returncode == -signal.SIGKILL
    # If the chip's memory is too small, the child returns a plan: here this machine's ran out.
    if killed or _says_out_of_memory(said, done):
        reason = "killed by the system" if killed else said
        return OutOfMemory(
            f"this machine, not the chip, has too little memory to compile for {target.name}; "
            f"free some of it, or plan on a larger machine ({reason})."
        )
    kind, _, words = said.partition(": ")
    if kind.endswith(_OF_COMPILER) or done.returncode < 0:
        return CompilerFailure(
            f"{target.compiler} failed to compile the step for {target.name}, for a reason other "
            f"than memory ({words or said})."
        )
    if kind == ValueError.__name__:
        return ValueError(words)
    return RuntimeError(f"compiling failed: {said}\n{_ending(done)}")


def _says_out_of_memory(said: str, done: subprocess.CompletedProcess) -> bool:
    """Tells whether a process reports that memory ran out.

    Args:
        said: first line of the exception that ended it.
        done: the process.
    """
    if done.returncode < 0:
        # A crash in C++ may report it before the last line.
        return is_out_of_memory(RuntimeError(_ending(done)))
    kind = said.partition(": ")[0]
    # The message of another exception may quote a user's path.
    if _TRACEBACK in done.stderr and not kind.endswith(_OF_MEMORY):
        return False
    return kind == MemoryError.__name__ or is_out_of_memory(RuntimeError(said))


def _ending(done: subprocess.CompletedProcess) -> str:
    """Returns the end of a process's stderr."""
    return done.stderr[-3000:]


def _exception_line(text: str) -> str:
    """Returns the first line of the exception that ended a process, or the last line of stderr.

    Args:
        text: stderr of the process.
    """
    _, found, ending = text.rpartition(_TRACEBACK)
    lines = ending.strip("\n").splitlines() or [""]
    if found:
        for line in lines:
            # The stack frames are indented.
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
            f"the compiler for {target.name}, {target.compiler}, is not installed: "
            f"pip install '{package}'."
        )
