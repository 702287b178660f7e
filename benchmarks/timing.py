"""The seconds of programs that run in this process."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

Name = TypeVar("Name")


class Seconds(NamedTuple):
    """What one call took.

    Attributes:
        wall: by the clock.
        processor: of all threads of this process; it hardly depends on what else the machine does.
    """

    wall: float
    processor: float


def time_call(run: Callable[[], Any]) -> Seconds:
    """Measures one call of a function, which waits for its own results."""
    wall = time.perf_counter()
    processor = time.process_time()
    run()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


class RepeatedStep:
    """A train step that continues from its last state at every call, with one batch.

    Attributes:
        metrics: of the latest call.
    """

    metrics: Any = None

    def __init__(self, step: Callable, train: Any, batch: Any):
        """Takes the step, the state before it, which is donated, and the batch."""
        self._step = step
        self._train = train
        self._batch = batch

    def __call__(self) -> None:
        """Makes the next step and waits for its metrics."""
        self._train, self.metrics = self._step(self._train, self._batch)
        jax.block_until_ready(self.metrics)


def take_turns(
    runs: Mapping[Name, Callable[[], Any]], rounds: int, *, warm: bool = False
) -> dict[Name, list[Seconds]]:
    """Measures each function once a round.

    They take turns, so that a machine that is busy for a while slows all of them equally.

    Args:
        runs: the functions by name; each waits for its own results.
        rounds: calls of each one that are measured.
        warm: whether a call that is not measured comes before each one that is: what ran before
            has filled the caches with its own.
    """
    found: dict[Name, list[Seconds]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if warm:
                run()
            found[name].append(time_call(run))
    return found


def median_processor_seconds(
    runs: Mapping[Name, Callable[[], Any]], rounds: int, *, warm: bool = False
) -> dict[Name, float]:
    """Measures each function's median processor seconds, as `take_turns` does."""
    medians = {}
    for name, found in take_turns(runs, rounds, warm=warm).items():
        medians[name] = statistics.median(one.processor for one in found)
    return medians
