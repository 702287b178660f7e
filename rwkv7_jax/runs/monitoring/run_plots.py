"""The plot of a tuned start state, drawn when the run has finished.

The curves of the loss and of metrics are in `report.html`, which needs no matplotlib.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rwkv7_jax.checks import first_line
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.reports import plots
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.state_tuning import StateTuningMode, UpscaledStateMode
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.sharding import to_host
from rwkv7_jax.tuning.state_arithmetic import singular_values


@contextlib.contextmanager
def warn_if_not_drawn(what: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Turns an error of the block into a warning: the results that it draws are already written.

    Args:
        what: the beginning of the sentence, such as "the state".
        warn: prints the warning.
    """
    try:
        yield
    # Any exception: a broken matplotlib raises many classes, and memory may run out.
    except Exception as error:
        warn(f"{what} cannot be drawn: {first_line(error)}")


def draw(folder: RunDirectory, mode: TrainingMode, trained: Any) -> None:
    """Plots the singular values of a tuned start state next to those of a typical state.

    Args:
        folder: receives the plot, `state.png`.
        mode: of the run; only mode "state" has a plot.
        trained: the trainable parameters at the end of the run.
    """
    # The WKV part of an upscaled state stays zero, so there is nothing to plot.
    if not isinstance(mode, StateTuningMode) or isinstance(mode, UpscaledStateMode):
        return
    if not plots.available():
        print("no plot: matplotlib is missing (pip install 'rwkv7_jax[plot]')")
        return
    prompt = mode.data.stream[: mode.settings.data.length]
    typical = prefill_state(mode.model, mode.frozen, prompt)
    plots.states(
        folder.path / "state.png",
        singular_values(to_host(typical.wkv)),
        singular_values(trained.wkv),
    )
