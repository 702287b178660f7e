"""Runs of several processes: how they join, agree and share what process 0 restores.

A process that dies ends the others. Where the call that waits for it does not fail by itself, JAX
ends them with SIGABRT after `HEARTBEAT_SECONDS` and prints the reason. Started again, all go on
from the newest checkpoint of process 0.
"""

import collections
import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rwkv7_jax.runs.early_stopping import Progress, read_progress
from rwkv7_jax.runs.exit_codes import EndedElsewhere, exit_code
from rwkv7_jax.runs.resume.run_identity import Identity
from rwkv7_jax.runs.run_directory import (
    NullRunDirectory,
    OwnedRunDirectory,
    RunDirectory,
)
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.sharding import shard_batch
from rwkv7_jax.training.train_step import TrainState

# Silence after which a process counts as lost.
HEARTBEAT_SECONDS = 30


def join(coordinator: str, *, processes: int, process: int) -> None:
    """Joins the other processes of the run; does nothing without a coordinator.

    Must be called before anything asks for a device.

    Args:
        coordinator: address and port of process 0, or "auto" where the cluster (Cloud TPU, Slurm,
            ...) knows it and the other two.
        processes: how many there are, unless "auto".
        process: which one this is, from 0, unless "auto".

    Raises:
        ValueError: there are several processes, and it is not said which one this is or where
            process 0 is.
    """
    if not coordinator:
        if (processes, process) != (1, 0):
            raise ValueError(
                "`--coordinator` must say where the first of `--processes` is."
            )
        return
    if coordinator == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        return
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(
            f"`--coordinator` must be auto or an address and port; got {coordinator!r}."
        )
    if not 0 <= process < processes:
        raise ValueError(
            f"`--process` must be at least 0 and below `--processes`; got {process} of {processes}."
        )
    jax.distributed.initialize(
        coordinator_address=coordinator,
        num_processes=processes,
        process_id=process,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def _is_single_process() -> bool:
    # `jax.process_count()` would start the backend, which takes seconds.
    return not jax.distributed.is_initialized()


def shutdown() -> None:
    """Waits for the other processes and leaves them; nothing may be shared afterwards."""
    if not _is_single_process():
        jax.distributed.shutdown()


def is_process_0() -> bool:
    """Returns whether this is the process that writes and prints."""
    return jax.process_index() == 0


def _broadcast_array(array: np.ndarray) -> np.ndarray:
    """Returns the array of process 0; those of the others only have its shape and dtype."""
    array = np.asarray(array)
    # As bytes: JAX would turn float64 into float32, and NaN payloads must survive.
    raw = np.frombuffer(array.tobytes(), np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(raw))
    return np.frombuffer(received.tobytes(), array.dtype).reshape(array.shape)


def _broadcast_text(text: str) -> str:
    """Returns the text of process 0."""
    raw = np.frombuffer(text.encode(), np.uint8)
    # The others have to know the size first: an array of another shape would hang.
    size = int(_broadcast_array(np.asarray(len(raw), np.int32)))
    if not is_process_0():
        raw = np.zeros(size, np.uint8)
    return _broadcast_array(raw).tobytes().decode()


def run_on_process_0(call: Callable[[], str]) -> str:
    """Calls a function in process 0 only and returns its text in all processes.

    An error of `call` is raised in process 0 as it is.

    Raises:
        EndedElsewhere: in the other processes, if `call` raised.
    """
    if _is_single_process():
        return call()
    text = ""
    error: Exception | None = None
    if is_process_0():
        try:
            text = call()
        # Whatever it is, the others wait for an answer.
        except Exception as caught:
            error = caught
    # An error without an exit code is a bug: the other processes end with Python's usual 1.
    code = None if error is None else exit_code(error) or 1
    answer = {"text": text, "error": str(error or ""), "code": code}
    answer = json.loads(_broadcast_text(json.dumps(answer)))
    if error is not None:
        raise error
    if answer["code"] is not None:
        raise EndedElsewhere(answer["error"], answer["code"])
    return answer["text"]


def broadcast_from_0(tree: Any) -> Any:
    """Returns the arrays of process 0, bit for bit; those of the others have the same shapes."""
    return tree if _is_single_process() else jax.tree.map(_broadcast_array, tree)


class AnyProcess:
    """Cross-process OR of a flag, read with a delay so that no step blocks on it."""

    def __init__(self, mesh: Mesh | None, *, delay: int = 2):
        """Takes the mesh of all processes' devices.

        Args:
            mesh: of the run; None for a single device.
            delay: steps after which a flag is read.
        """
        self._mesh = mesh
        self._delay = delay
        self._pending: collections.deque[jax.Array] = collections.deque()
        # The result of a sharded array is replicated, so every process reads the same OR.
        self._any = jax.jit(lambda flags: flags.any())

    def __call__(self, flag: bool) -> bool:
        """Sends this process's flag and returns the OR of all flags sent `delay` steps ago."""
        if _is_single_process():
            return flag
        # One flag for each device: the rows that a process has are those of its own devices.
        flags = np.full(len(jax.devices()), flag)
        sharded = shard_batch(self._mesh, {"flag": flags})["flag"]
        self._pending.append(self._any(sharded))
        if len(self._pending) <= self._delay:
            return False
        return bool(self._pending.popleft())


@contextlib.contextmanager
def open_run_directory(
    workdir: str | Path, settings: Settings
) -> Iterator[RunDirectory]:
    """Opens the run directory in process 0; the others get a null one and a silent stdout.

    Raises:
        ValueError, ImportError, DiskError: as `OwnedRunDirectory`, in process 0.
        EndedElsewhere: in the others, then.
    """
    with contextlib.ExitStack() as stack:
        # `run_on_process_0` returns text alone: the directory gets out through this list.
        owned: list[RunDirectory] = []

        def open_it() -> str:
            owned.append(stack.enter_context(OwnedRunDirectory(workdir, settings)))
            return ""

        # All processes meet here, so none goes on where process 0 cannot open the directory.
        run_on_process_0(open_it)
        if owned:
            yield owned[0]
            return
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield NullRunDirectory(Path(temporary))


def restore_and_broadcast(
    directory: RunDirectory,
    abstract: TrainState,
    identity: Identity,
    init: Callable[[], TrainState],
) -> tuple[TrainState, Progress]:
    """Restores the newest checkpoint in process 0 and sends it to all.

    Args:
        directory: of the run.
        abstract: shapes and dtypes of the state.
        identity: of the run.
        init: makes the state of a new run; called only in process 0, where there is no checkpoint.

    Raises:
        NoValidCheckpoint, ValueError: as `RunDirectory.restore`, in process 0.
        EndedElsewhere: in the others, then.
    """
    state: TrainState | None = None

    def restore() -> str:
        nonlocal state
        state, progress = directory.restore(abstract, identity, init)
        return json.dumps(progress.to_json())

    progress = read_progress(json.loads(run_on_process_0(restore)))
    if state is None:
        # Of the other processes' arrays only the shapes and dtypes count.
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    return broadcast_from_0(state), progress
