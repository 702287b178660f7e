"""Runs of several processes: how they join, where they work, and how they begin.

A process that dies ends the others. Where the call that waits for it does not fail by itself, JAX
ends them with SIGABRT after `HEARTBEAT_SECONDS` and prints the reason. Started again, all go on
from the newest checkpoint.
"""

import collections
import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rwkv7_jax.runs.process_group import group_of_run, is_single_process
from rwkv7_jax.runs.run_directory import (
    NullRunDirectory,
    OwnedRunDirectory,
    RunDirectory,
)
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.runs.waiting import report_wait

# Silence after which a process counts as lost.
HEARTBEAT_SECONDS = 30

# Seconds in which all processes have to come; JAX aborts those that wait for one that does not.
JOIN_SECONDS = 300

# Steps after which a flag that a process sends to the others is read.
_DELAY = 2


def join(coordinator: str, *, processes: int, process: int) -> None:
    """Joins the other processes of the run; does nothing without a coordinator.

    Must be called before anything asks for a device. Says what it waits for; JAX ends a process
    that waits in vain for `JOIN_SECONDS` with SIGABRT.

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
        _initialize("the cluster's other processes")
        return
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(
            f"`--coordinator` must be auto or an address and port; got {coordinator!r}."
        )
    if not 0 <= process < processes:
        raise ValueError(
            f"`--process` must be at least 0 and below `--processes`; got {process} of {processes}."
        )
    _initialize(
        f"all {processes} processes to meet at {coordinator}",
        coordinator_address=coordinator,
        num_processes=processes,
        process_id=process,
    )


def _initialize(what: str, **named: Any) -> None:
    """Joins the others as JAX does; `what` says in messages what is waited for."""
    with report_wait(f"{what}, {JOIN_SECONDS} s at most"):
        jax.distributed.initialize(
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            **named,
        )


def shutdown() -> None:
    """Waits for the other processes and leaves them; nothing may be shared afterwards."""
    if not is_single_process():
        jax.distributed.shutdown()


class AnyProcess:
    """Cross-process OR of a flag, read with a delay so that no step blocks on it."""

    def __init__(self, mesh: Mesh | None):
        """Takes the mesh of all processes' devices; None for a single device."""
        self._mesh = mesh
        self._pending: collections.deque[jax.Array] = collections.deque()
        # The result of a sharded array is replicated, so every process reads the same OR.
        self._any = jax.jit(lambda flags: flags.any())

    def __call__(self, flag: bool) -> bool:
        """Sends this process's flag and returns the OR of all flags sent `_DELAY` steps ago."""
        if is_single_process():
            return flag
        assert self._mesh is not None
        # One flag for each device, along all axes: a process has those of its own devices.
        flags = np.full(self._mesh.size, flag)
        place = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        sharded = jax.make_array_from_callback(
            flags.shape, place, lambda index: flags[index]
        )
        self._pending.append(self._any(sharded))
        if len(self._pending) <= _DELAY:
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
    group = group_of_run()
    with contextlib.ExitStack() as stack:

        def open_owned() -> RunDirectory | None:
            if not group.is_primary:
                return None
            return stack.enter_context(OwnedRunDirectory(workdir, settings))

        # All processes meet here, so none goes on where process 0 cannot open the directory.
        owned = group.run_in_all(open_owned)
        # Of process 0: another machine need not have the folder, or the copy that it came from.
        began = group.from_process_0(lambda: owned.began if owned else {})
        if owned is not None:
            yield owned
            return
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        directory = NullRunDirectory(
            Path(temporary), Path(workdir).absolute(), settings, began
        )
        # Process 0 waits for what this one still writes.
        stack.callback(lambda: directory.checkpoints.leave())
        yield directory
