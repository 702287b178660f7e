"""A profiler trace of some steps of a run."""

from pathlib import Path
from typing import Any

import jax

from rwkv7_jax.runs.process_group import is_process_0


class ProfileWindow:
    """A profiler trace of a range of steps, written to a folder.

    In a run of several processes only process 0 traces, and only its own devices: the others have
    no folder that lasts.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        """Takes the first and the last step to trace; None traces nothing."""
        self._steps = steps if is_process_0() else None
        self._folder = folder
        self._last_step: int | None = None

    def before(self, step: int) -> None:
        """Starts the trace in the first step of the window, or in a later one of a resumed run."""
        if self._steps is None or self._last_step is not None:
            return
        first, last = self._steps
        if first <= step <= last:
            jax.profiler.start_trace(str(self._folder))
            self._last_step = last

    def after(self, step: int, result: Any) -> None:
        """Ends the trace if this was the last step of the window.

        Args:
            step: the step that was dispatched.
            result: its arrays. The trace ends only when the device has computed them.
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
