"""Several processes that make one run: they join, they agree, and the first one speaks.

A process that dies takes the others with it. Where what they wait for does not fail by itself, JAX
ends them with SIGABRT within the heartbeat's time, and says why on stderr. All go on from the first
one's newest checkpoint when they are started again.
"""

import collections
import contextlib
import dataclasses
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

from rwkv7_jax.runs.early_stopping import RunProgress
from rwkv7_jax.runs.exit_codes import EndedElsewhere, exit_code
from rwkv7_jax.runs.resume.checkpoint_record import Identity
from rwkv7_jax.runs.run_directory import Folder, NullRunDirectory, RunFolder
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.sharding import shard_batch
from rwkv7_jax.training.train_step import TrainState

# Silence after which a process counts as lost.
HEARTBEAT_SECONDS = 30


def join(coordinator: str, *, processes: int, process: int) -> None:
    """This process is one of several; nothing happens where no coordinator is named.

    To be called before anything asks for a device.

    Args:
        coordinator: address and port of the first process, or "auto" where the cluster (Cloud TPU,
            Slurm, ...) tells all.
        processes: how many, unless "auto".
        process: which one this is, from 0, unless "auto".

    Raises:
        ValueError: one of several processes, and not said which or where the first one is.
    """
    if not coordinator:
        if (processes, process) != (1, 0):
            raise ValueError("`--coordinator` must say where the first of `--processes` is.")
        return
    told = {}
    if coordinator != "auto":
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ValueError(
                f"`--coordinator` must be auto or an address and port; got {coordinator!r}."
            )
        if not 0 <= process < processes:
            raise ValueError(
                f"`--process` must be at least 0 and below `--processes`; got {process} of "
                f"{processes}."
            )
        told = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
        }
    jax.distributed.initialize(**told, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def _alone() -> bool:
    """Known without asking for a device, which takes seconds."""
    return not jax.distributed.is_initialized()


def shutdown() -> None:
    """All have come this far, and none needs another any more."""
    if not _alone():
        jax.distributed.shutdown()


def is_process_0() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def _shared(array: np.ndarray) -> np.ndarray:
    """The first process's array; all have its shape and dtype. Bits are sent, not numbers."""
    array = np.asarray(array)
    raw = np.frombuffer(array.tobytes(), np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(raw))
    return np.frombuffer(sent.tobytes(), array.dtype).reshape(array.shape)


def _shared_text(text: str) -> str:
    raw = np.frombuffer(text.encode(), np.uint8)
    size = int(_shared(np.int32(len(raw))))
    return (
        _shared(np.resize(raw, size) if is_process_0() else np.zeros(size, np.uint8))
        .tobytes()
        .decode()
    )


def run_on_process_0(call: Callable[[], str]) -> str:
    """The text that `call` gives in the first process, where alone it runs.

    Raises:
        EndedElsewhere: it raised what ends a run; the first process raises just that.
    """
    if _alone():
        return call()
    text, error = "", None
    if is_process_0():
        try:
            text = call()
        except Exception as caught:
            error = caught
    said = {"text": text, "error": str(error or ""), "code": error and (exit_code(error) or 1)}
    said = json.loads(_shared_text(json.dumps(said)))
    if error is not None:
        raise error
    if said["code"] is not None:
        raise EndedElsewhere(said["error"], said["code"])
    return said["text"]


def broadcast_from_0(tree: Any) -> Any:
    """The arrays of the first process, bit for bit; the others' have the same shapes."""
    return tree if _alone() else jax.tree.map(_shared, tree)


class AnyProcess:
    """Whether any process wishes something, known to all behind the same step.

    Nobody waits for an answer: it is looked at some steps later.
    """

    def __init__(self, mesh: Mesh | None, *, behind: int = 2):
        """Nobody wishes anything."""
        self._mesh, self._behind, self._asked = mesh, behind, collections.deque()
        self._any = jax.jit(lambda flags: flags.any())

    def __call__(self, wish: bool) -> bool:
        """This process's wish at a step goes out; what all wished `behind` steps ago comes back."""
        if _alone():
            return wish
        mine = np.full(len(jax.devices()), wish)
        self._asked.append(self._any(shard_batch(self._mesh, {"wish": mine})["wish"]))
        return len(self._asked) > self._behind and bool(self._asked.popleft())


@contextlib.contextmanager
def open_run_directory(workdir: str | Path, settings: Settings) -> Iterator[Folder]:
    """The run's folder; the first process alone writes, and alone is heard on stdout.

    Raises:
        ValueError, ImportError, DiskError: as `RunFolder`, in the first process.
        EndedElsewhere: in the others, then.
    """
    with contextlib.ExitStack() as stack:
        taken: list[Folder] = []

        def take() -> str:
            taken.append(stack.enter_context(RunFolder(workdir, settings)))
            return ""

        run_on_process_0(take)
        if not taken:
            taken.append(NullRunDirectory(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        yield taken[0]


def restore_and_broadcast(
    folder: Folder, fresh: TrainState, identity: Identity
) -> tuple[TrainState, RunProgress]:
    """What `RunFolder.restore` finds in the first process, in all of them.

    Raises:
        NoValidCheckpoint, ValueError: as it, in the first process.
        EndedElsewhere: in the others, then.
    """
    state, course = fresh, RunProgress()

    def read() -> str:
        nonlocal state, course
        state, course = folder.restore(fresh, identity)
        return json.dumps(dataclasses.asdict(course))

    course = RunProgress.from_json(json.loads(run_on_process_0(read)))
    return broadcast_from_0(state), course
