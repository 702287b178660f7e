"""How the processes of a run agree: what the first one says, and what all of them answer.

All processes make the same calls in the same order; one that makes another waits for ever, or until
JAX ends it.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rwkv7_jax.runs.exit_codes import EndedElsewhere, exit_code
from rwkv7_jax.sharding import is_shared

_Result = TypeVar("_Result")


def is_single_process() -> bool:
    """Returns whether this process has not joined others."""
    # `jax.process_count()` would start the backend, which takes seconds.
    return not jax.distributed.is_initialized()


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


def broadcast_from_0(tree: Any) -> Any:
    """Returns the arrays of process 0, bit for bit; those of the others have the same shapes."""
    return tree if is_single_process() else jax.tree.map(_broadcast_array, tree)


def run_on_process_0(call: Callable[[], str]) -> str:
    """Calls a function in process 0 only and returns its text in all processes.

    An error of `call` is raised in process 0 as it is.

    Raises:
        EndedElsewhere: in the other processes, if `call` raised.
    """
    if is_single_process():
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


def all_processes() -> "Alone":
    """Returns the processes of the run, wherever its arrays lie."""
    return Alone() if is_single_process() else Together()


def deciding_about(mesh: Mesh | None) -> "Alone":
    """Returns the processes that decide about what lies on a mesh: all that share its arrays."""
    return Together() if is_shared(mesh) else Alone()


def _gather_texts(text: str) -> list[str]:
    """Returns the text of each process."""
    raw = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(raw), np.int32))
    padded = np.zeros(max(1, *sizes.tolist()), np.uint8)
    padded[: len(raw)] = raw
    rows = multihost_utils.process_allgather(padded)
    return [
        row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
    ]


class Alone:
    """A process that decides for itself, whether or not the run has others.

    Attributes:
        is_first: whether this is the process that writes.
        members: numbers of the processes that decide.
    """

    is_first = True
    members: tuple[int, ...] = (0,)

    def texts(self, text: str) -> list[str]:
        """Returns the text of each process."""
        return [text]

    def on_first(self, call: Callable[[], _Result]) -> _Result:
        """Returns in all processes what the first one computes, fit for JSON.

        Raises:
            EndedElsewhere: in the others, if `call` raised in the first.
        """
        return call()

    def everywhere(
        self, call: Callable[[], _Result], *, expected: type[Exception] | None = None
    ) -> _Result:
        """Calls a function in all processes; an error in one of them is raised in all.

        Args:
            call: where it waits for others, it has to do so even if it fails.
            expected: a class of errors that the others raise as well, with the same text.

        Raises:
            EndedElsewhere: in the others, for an error of another class than `expected`.
        """
        return call()

    def gather(self, call: Callable[[], Any]) -> list[Any]:
        """Returns in all processes what each of them computes, fit for JSON.

        Raises:
            EndedElsewhere: in the others, if `call` raised in one.
        """
        return [call()]


class Together(Alone):
    """All processes of the run, which decide together."""

    def __init__(self) -> None:
        """Counts the processes."""
        self.is_first = is_process_0()
        self.members = tuple(range(jax.process_count()))

    def texts(self, text: str) -> list[str]:
        """Returns the text of each process."""
        return _gather_texts(text)

    def on_first(self, call: Callable[[], _Result]) -> _Result:
        """Sends what the first process computes to the others; see `Alone.on_first`."""
        return json.loads(run_on_process_0(lambda: json.dumps(call())))

    def everywhere(
        self, call: Callable[[], _Result], *, expected: type[Exception] | None = None
    ) -> _Result:
        """Exchanges the errors of all processes; see `Alone.everywhere`."""
        result: _Result | None = None
        error: Exception | None = None
        try:
            result = call()
        # Whatever it is, the others wait for an answer.
        except Exception as caught:
            error = caught
        is_expected = expected is not None and isinstance(error, expected)
        code = None if error is None or is_expected else exit_code(error) or 1
        answer = {"error": str(error or ""), "code": code, "expected": is_expected}
        answers = [json.loads(text) for text in self.texts(json.dumps(answer))]
        own = error if code else None
        # Errors that end the run come first: an expected one may be answered by going on.
        for one in answers:
            if one["code"] is not None:
                raise own or EndedElsewhere(one["error"], one["code"])
        for one in answers:
            if one["expected"] and expected is not None:
                raise error or expected(one["error"])
        return cast(_Result, result)

    def gather(self, call: Callable[[], Any]) -> list[Any]:
        """Exchanges what all processes compute; see `Alone.gather`."""
        text = self.everywhere(lambda: json.dumps(call()))
        return [json.loads(one) for one in self.texts(text)]
