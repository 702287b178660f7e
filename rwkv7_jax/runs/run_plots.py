"""The pictures of a finished run."""

import math
from typing import Any

from rwkv7_jax.evaluation.metric import SHARES, unit_of
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.reports import plots as pictures
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.state_tuning import StateMode, UpscaledStateMode
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.tuning.state_arithmetic import singular_values


def draw(folder: RunDirectory, mode: TrainingMode, trained: Any) -> None:
    """Draws the loss and the metrics over the steps; of a start state also its singular values."""
    if not pictures.available():
        print("no pictures: matplotlib is missing (pip install 'rwkv7_jax[plot]')")
        return
    rows = folder.rows()
    lines = _points(rows, "loss_nats", "training (bits per token)", scale=1 / math.log(2))
    lines |= _points(rows, "held_out_bits_per_byte", "held out (bits per byte)")
    shares = {}
    if "held out (bits per byte)" not in lines:
        names = dict.fromkeys(name for row in rows for name in row if unit_of(name) in SHARES)
        for name in list(names)[:4]:
            shares |= _points(rows, name, name.replace("_", " "))
    pictures.curves(folder.path / "loss.png", lines, x="step", y="bits", shares=shares)
    if isinstance(mode, StateMode) and not isinstance(mode, UpscaledStateMode):
        prompt = mode.data.stream[: mode.settings.data.length]
        typical = prefill_state(mode.model, mode.frozen, prompt)
        pictures.states(
            folder.path / "state.png",
            singular_values(typical.wkv),
            singular_values(trained.wkv),
        )


def _points(rows: list[dict], name: str, label: str, *, scale: float = 1.0) -> dict:
    """The line of a number in the log, if it is there."""
    points = [(float(row["step"]), row[name] * scale) for row in rows if name in row]
    return {label: points} if points else {}
