"""Runs of several processes: how they join, agree on a flag, and open the run directory.

If a process dies, the others end too. If their pending collective does not fail by itself, JAX
ends them with SIGABRT after `HEARTBEAT_SECONDS` and prints the reason. When they are restarted, all
resume from the newest checkpoint.
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
from rwkv7_jax.runs.same_in_all import require_same_command
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.runs.waiting import report_wait

# Seconds without a heartbeat after which a process counts as lost.
HEARTBEAT_SECONDS = 30

# Seconds within which all processes must connect. After them JAX aborts those that wait.
JOIN_SECONDS = 300

# Steps between sending a flag to the other processes and reading it.
_DELAY = 2


def join(coordinator: str, *, processes: int, process: int) -> None:
    """Joins the other processes of the run; does nothing without a coordinator.

    It must be called before any use of a device. It reports what it waits for; JAX ends a process
    that waits in vain for `JOIN_SECONDS` with SIGABRT.

    Args:
        coordinator: the address and port of process 0; "auto" if the cluster (Cloud TPU, Slurm,
            ...) provides all three values.
        processes: the number of processes; ignored with "auto".
        process: the index of this process, from 0; ignored with "auto".

    Raises:
        ValueError: the coordinator or the index of this process is missing or invalid.
    """
    if not coordinator:
        if (processes, process) != (1, 0):
            raise ValueError(
                "`--coordinator` must be given with `--processes` or `--process`."
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
    """Initializes `jax.distributed`; `what` names the wait in messages."""
    with report_wait(f"{what}, {JOIN_SECONDS} s at most"):
        jax.distributed.initialize(
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            **named,
        )


def shutdown() -> None:
    """Waits for the other processes, then disconnects; no collective may follow."""
    if not is_single_process():
        jax.distributed.shutdown()


class AnyProcess:
    """A logical OR of a flag over all processes, read with a delay so that no step blocks on it."""

    def __init__(self, mesh: Mesh | None):
        """Stores the mesh of all processes' devices; None for a single device."""
        self._mesh = mesh
        self._pending: collections.deque[jax.Array] = collections.deque()
        # The result is replicated, so every process reads the same value.
        self._any = jax.jit(lambda flags: flags.any())

    def __call__(self, flag: bool) -> bool:
        """Sends this process's flag; returns the OR of all flags sent `_DELAY` steps ago."""
        if is_single_process():
            return flag
        assert self._mesh is not None
        # One flag per device, sharded over all axes; a process sets those of its own devices.
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
    """Opens the run directory in process 0; the others get a null directory and a silent stdout.

    Raises:
        ValueError: the processes differ in their settings, files or versions.
        ValueError, ImportError, DiskError: in process 0, as `OwnedRunDirectory`.
        EndedElsewhere: in the others, if process 0 fails.
    """
    group = group_of_run()
    # Before process 0 creates the directory or writes to it.
    require_same_command(group, settings)
    with contextlib.ExitStack() as stack:

        def open_owned() -> RunDirectory | None:
            if not group.is_primary:
                return None
            return stack.enter_context(OwnedRunDirectory(workdir, settings))

        # All processes synchronise here, so none continues if process 0 cannot open the directory.
        owned = group.run_in_all(open_owned)
        # From process 0: another machine need not have the run directory or its backup.
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
        # Process 0 waits for the shards that this process still writes.
        stack.callback(lambda: directory.checkpoints.leave())
        yield directory
