"""The prompts of a step that one of several processes answers and judges."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


def _call_alone(make: Callable[[], Any]) -> list[Any]:
    return [make()]


@dataclasses.dataclass(frozen=True)
class PromptShare:
    """Divides the prompts of a step among processes; a single process has them all.

    All completions of a prompt are of one process, which judges them.

    Attributes:
        index: of this process, from 0.
        count: of the processes.
        drawn_together: whether all processes draw all completions in common programs, as they must
            where the weights lie in shards over them. Otherwise each draws its own.
        gather: calls a function in every process and returns in all of them what each call
            returned, fit for JSON, in the processes' order; an error in one is raised in all.
    """

    index: int = 0
    count: int = 1
    drawn_together: bool = False
    gather: Callable[[Callable[[], Any]], list[Any]] = _call_alone

    def judged(self, prompts: int) -> slice:
        """Returns which of a number of prompts this process judges."""
        first = self.index * prompts // self.count
        return slice(first, (self.index + 1) * prompts // self.count)

    def drawn(self, prompts: int) -> slice:
        """Returns which of a number of prompts this process draws completions of."""
        return slice(0, prompts) if self.drawn_together else self.judged(prompts)

    def join(self, make: Callable[[], list[Any]]) -> list[Any]:
        """Joins the lists that all processes make of their prompts."""
        joined = []
        for part in self.gather(make):
            joined += part
        return joined

    def join_rows(self, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Joins the rows of the arrays of numbers that all processes make; float64."""
        return np.array(self.join(lambda: make().tolist()), np.float64)


# Of a single process.
ALONE = PromptShare()
