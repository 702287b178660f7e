"""The plot of a tuned start state, drawn when the run has finished.

The curves of the loss and of metrics are in `report.html`, which needs no matplotlib.
"""

from typing import Any

from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.reports import plots
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.state_tuning import StateTuningMode, UpscaledStateMode
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.sharding import to_host
from rwkv7_jax.tuning.state_arithmetic import singular_values


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
