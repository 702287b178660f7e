"""A profile of some steps of a run."""

from pathlib import Path
from typing import Any

import jax

from rwkv7_jax.runs.process_group import is_process_0


class ProfileWindow:
    """A trace of the steps from the first to the last of a pair, written into a folder.

    Of several processes the first one alone traces itself and its devices: the others have no
    folder that lasts.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        """Takes the steps to trace; None traces nothing."""
        self._steps = steps if is_process_0() else None
        self._folder = folder
        self._last_step: int | None = None

    def before(self, step: int) -> None:
        """Begins to trace if this is the first step of the window."""
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._last_step = self._steps[1]

    def after(self, step: int, result: Any) -> None:
        """Ends the trace if this was the last step of the window.

        Args:
            step: the one that was dispatched.
            result: its arrays, which are waited for: the device may still compute them.
        """
        if self._last_step is not None and step >= self._last_step:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes the trace, if there is one."""
        if self._last_step is not None:
            self._last_step = None
            jax.profiler.stop_trace()
            print(f"profile   {self._folder}")
