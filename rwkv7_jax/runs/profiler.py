"""A profile of some steps of a run."""

from pathlib import Path
from typing import Any

import jax


class ProfileWindow:
    """Traces the steps from the first to the last of a pair into a folder; None traces nothing."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        """Nothing is traced yet."""
        self._steps, self._folder, self._open = steps, folder, False

    def before(self, step: int) -> None:
        """Tracing has begun if this is the first step of the window."""
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._open = True

    def after(self, step: int, result: Any) -> None:
        """Tracing has ended, with `result` there, if this was the last step of the window."""
        if self._open and step >= self._steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Nothing is traced; what was is in the folder."""
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
            print(f"profile   {self._folder}")
