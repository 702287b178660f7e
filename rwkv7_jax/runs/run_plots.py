"""The pictures of a finished run."""

import math
from typing import Any

from rwkv7_jax.evaluation.metric import SHARES, unit_of
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.reports import plots
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.state_tuning import StateMode, UpscaledStateMode
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.tuning.state_arithmetic import singular_values

# More lines than these cannot be told apart in one picture.
_MOST_SHARES = 4

Points = list[tuple[float, float]]


def draw(folder: RunDirectory, mode: TrainingMode, trained: Any) -> None:
    """Draws the loss and the metrics over the steps; of a start state also its singular values.

    Args:
        folder: of the run; the pictures go there.
        mode: of the run.
        trained: the run's result.
    """
    if not plots.available():
        print("no pictures: matplotlib is missing (pip install 'rwkv7_jax[plot]')")
        return
    rows = folder.rows()
    lines: dict[str, Points] = {}
    _add_line(lines, rows, "loss_nats", "training (bits per token)", scale=1 / math.log(2))
    unit = "bits"
    if not lines:
        # A weighted sum of terms, such as an observer's without answers, is not in bits.
        _add_line(lines, rows, "loss", "training (loss)")
        unit = "loss"
    _add_line(lines, rows, "held_out_bits_per_byte", "held out (bits per byte)")
    shares: dict[str, Points] = {}
    # Where text is measured, its bits say more than the accuracies of tasks besides it.
    if "held out (bits per byte)" not in lines:
        for name in _share_names(rows)[:_MOST_SHARES]:
            _add_line(shares, rows, name, name.replace("_", " "))
    plots.curves(folder.path / "loss.png", lines, x="step", y=unit, shares=shares)
    if isinstance(mode, StateMode) and not isinstance(mode, UpscaledStateMode):
        prompt = mode.data.stream[: mode.settings.data.length]
        typical = prefill_state(mode.model, mode.frozen, prompt)
        plots.states(
            folder.path / "state.png",
            singular_values(typical.wkv),
            singular_values(trained.wkv),
        )


def _share_names(rows: list[dict]) -> list[str]:
    """Lists the metrics between 0 and 1, in the order in which they came."""
    names: dict[str, None] = {}
    for row in rows:
        for name in row:
            if unit_of(name) in SHARES:
                names[name] = None
    return list(names)


def _add_line(
    lines: dict[str, Points], rows: list[dict], name: str, label: str, *, scale: float = 1.0
) -> None:
    """Adds the line of a number in the log, if it is there."""
    points = []
    for row in rows:
        if name in row:
            points.append((float(row["step"]), row[name] * scale))
    if points:
        lines[label] = points
