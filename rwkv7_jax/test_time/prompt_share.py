"""Divides the prompts of a step among processes, which complete and judge them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


def _call_alone(make: Callable[[], Any]) -> list[Any]:
    return [make()]


@dataclasses.dataclass(frozen=True)
class PromptShare:
    """This process's part of the prompts of a step; a single process has all of them.

    One process judges all completions of a prompt.

    Attributes:
        index: index of this process, from 0.
        count: number of processes.
        drawn_together: whether all processes sample all completions in common programs, as sharded
            weights require. Otherwise each process samples its own.
        gather: calls a function in every process and returns the JSON-compatible results of all
            calls, in the order of the processes; an error in one process is raised in all.
    """

    index: int = 0
    count: int = 1
    drawn_together: bool = False
    gather: Callable[[Callable[[], Any]], list[Any]] = _call_alone

    def judged(self, prompts: int) -> slice:
        """Returns the slice of `prompts` prompts that this process judges."""
        first = self.index * prompts // self.count
        return slice(first, (self.index + 1) * prompts // self.count)

    def drawn(self, prompts: int) -> slice:
        """Returns the slice of `prompts` prompts that this process samples completions for."""
        return slice(0, prompts) if self.drawn_together else self.judged(prompts)

    def join(self, make: Callable[[], list[Any]]) -> list[Any]:
        """Concatenates the lists that all processes make for their prompts."""
        joined = []
        for part in self.gather(make):
            joined += part
        return joined

    def join_rows(self, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Concatenates the rows of the arrays of all processes, as float64."""
        return np.array(self.join(lambda: make().tolist()), np.float64)


# The share of a single process.
ALONE = PromptShare()
