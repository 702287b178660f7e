"""The processes of a run as a group: what they exchange, and how they fail together.

All processes of a group must make the same calls in the same order. A process that makes another
call waits forever, or until JAX ends it.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rwkv7_jax.runs.exit_codes import EndedElsewhere, exit_code
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.sharding import is_shared

_Result = TypeVar("_Result")

# The attribute of an error that all processes know already.
_EXCHANGED = "exchanged_by_processes"


def is_single_process() -> bool:
    """Returns whether this process has not joined a distributed run."""
    # `jax.process_count()` would start the backend, which takes seconds.
    return not jax.distributed.is_initialized()


def is_process_0() -> bool:
    """Returns whether this is process 0, which writes and prints."""
    return jax.process_index() == 0


def group_of_run() -> "ProcessGroup":
    """Returns all processes of the run, regardless of where its arrays are."""
    return ProcessGroup() if is_single_process() else AllProcesses()


def group_of_mesh(mesh: Mesh | None) -> "ProcessGroup":
    """Returns the processes that share the arrays of a mesh: all processes, or only this one."""
    return group_of_run() if is_shared(mesh) else ProcessGroup()


class ProcessGroup:
    """A group of processes; this base class is a group of one process.

    Attributes:
        is_primary: whether this process writes for the group.
        index: the index of this process in the group.
        members: the numbers of the processes.
    """

    is_primary: bool = True
    index: int = 0
    members: tuple[int, ...] = (0,)

    @property
    def size(self) -> int:
        """The number of processes."""
        return len(self.members)

    def from_process_0(self, call: Callable[[], _Result]) -> _Result:
        """Calls a function in process 0 and returns its JSON-serialisable result in all processes.

        An error of `call` is raised unchanged in process 0.

        Raises:
            EndedElsewhere: in the other processes, if `call` raised.
        """
        return call()

    def broadcast_arrays(self, tree: Any) -> Any:
        """Returns the arrays of process 0, bit-exactly; the others pass arrays of equal shapes."""
        return tree

    def run_in_all(
        self, call: Callable[[], _Result], *, expected: type[Exception] | None = None
    ) -> _Result:
        """Calls a function in all processes; an error in one of them is raised in all.

        Args:
            call: the function. If it synchronises with other processes, it must do so even when it
                fails, or only through this method.
            expected: a class of errors that the other processes raise too, with the same text.

        Returns:
            This process's own result.

        Raises:
            EndedElsewhere: in the other processes, for an error that is not `expected`.
        """
        return call()

    def allgather(self, value: Any) -> list[Any]:
        """Returns the JSON-serialisable value of each process, in the order of `members`."""
        return [value]

    def allgather_results(self, call: Callable[[], Any]) -> list[Any]:
        """Calls a function in all processes and returns all of its JSON-serialisable results.

        Raises:
            EndedElsewhere: in the other processes, if `call` raised in one.
        """
        return [call()]


class AllProcesses(ProcessGroup):
    """All processes of a run that has several."""

    def __init__(self) -> None:
        """Counts the processes."""
        self.is_primary = is_process_0()
        self.index = jax.process_index()
        self.members = tuple(range(jax.process_count()))

    def from_process_0(self, call: Callable[[], _Result]) -> _Result:
        """Sends the result of process 0 to the others; see `ProcessGroup.from_process_0`."""
        result = ""
        error: Exception | None = None
        if self.is_primary:
            try:
                result = json.dumps(call())
            # Any error, because the others wait for an answer.
            except Exception as caught:
                error = caught
        # An error without an exit code is a bug: the other processes exit with 1, as Python does.
        code = None if error is None else exit_code(error) or 1
        answer = {"result": result, "error": str(error or ""), "code": code}
        with report_wait("process 0"):
            answer = json.loads(self._broadcast_text(json.dumps(answer)))
        if error is not None:
            raise error
        if answer["code"] is not None:
            raise EndedElsewhere(answer["error"], answer["code"])
        return json.loads(answer["result"])

    def broadcast_arrays(self, tree: Any) -> Any:
        """Sends the arrays of process 0; see `ProcessGroup.broadcast_arrays`."""
        with report_wait("the state that process 0 sends to all"):
            return jax.tree.map(_broadcast_array, tree)

    def run_in_all(
        self, call: Callable[[], _Result], *, expected: type[Exception] | None = None
    ) -> _Result:
        """Exchanges the errors of all processes; see `ProcessGroup.run_in_all`."""
        result: _Result | None = None
        error: Exception | None = None
        try:
            result = call()
        # Any error, because the others wait for an answer.
        except Exception as caught:
            if getattr(caught, _EXCHANGED, False):
                # By a call inside this one: all processes end here.
                raise
            error = caught
        is_expected = expected is not None and isinstance(error, expected)
        code = None if error is None or is_expected else exit_code(error) or 1
        answer = {"error": str(error or ""), "code": code, "expected": is_expected}
        answers = self.allgather(answer)
        own = error if code else None
        # Errors that end the run come first: the caller may handle an expected one and continue.
        for one in answers:
            if one["code"] is not None:
                raise _exchanged(own or EndedElsewhere(one["error"], one["code"]))
        for one in answers:
            if one["expected"] and expected is not None:
                raise _exchanged(error or expected(one["error"]))
        return cast(_Result, result)

    def allgather(self, value: Any) -> list[Any]:
        """Exchanges the values of all processes."""
        return [json.loads(text) for text in _allgather_texts(json.dumps(value))]

    def allgather_results(self, call: Callable[[], Any]) -> list[Any]:
        """Exchanges the results of all processes; see `ProcessGroup.allgather_results`."""
        # Serialise inside `run_in_all`, so that a failure to do so is raised in all processes.
        text = self.run_in_all(lambda: json.dumps(call()))
        return [json.loads(one) for one in _allgather_texts(text)]

    def _broadcast_text(self, text: str) -> str:
        """Returns the text of process 0."""
        raw = np.frombuffer(text.encode(), np.uint8)
        # The others need the size first: a broadcast with another shape would hang.
        size = int(_broadcast_array(np.asarray(len(raw), np.int32)))
        if not self.is_primary:
            raw = np.zeros(size, np.uint8)
        return _broadcast_array(raw).tobytes().decode()


def _exchanged(error: Exception) -> Exception:
    """Marks an error that all processes raise at the same place."""
    setattr(error, _EXCHANGED, True)
    return error


def _broadcast_array(array: np.ndarray) -> np.ndarray:
    """Returns the array of process 0; the others pass an array of the same shape and dtype."""
    array = np.asarray(array)
    # As bytes: JAX would convert float64 to float32, and NaN payloads must survive.
    raw = np.frombuffer(array.tobytes(), np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(raw))
    return np.frombuffer(received.tobytes(), array.dtype).reshape(array.shape)


def _allgather_texts(text: str) -> list[str]:
    """Returns the text of each process."""
    raw = np.frombuffer(text.encode(), np.uint8)
    # The last one that comes here lets all go on.
    with report_wait("the other processes of the run"):
        sizes = multihost_utils.process_allgather(np.asarray(len(raw), np.int32))
    padded = np.zeros(max(1, *sizes.tolist()), np.uint8)
    padded[: len(raw)] = raw
    rows = multihost_utils.process_allgather(padded)
    return [
        row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
    ]
