"""The pictures of a finished run."""

import math
from typing import Any

from rwkv7_jax.data.token_streams import TokenStream
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.reports import plots as pictures
from rwkv7_jax.runs.modes.base import Job
from rwkv7_jax.runs.run_directory import RunFolder
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.tuning.state_arithmetic import singular_values

_SHARES = ("accuracy", "reward")


def draw(
    folder: RunFolder, settings: Settings, job: Job, trained: Any, stream: TokenStream | None
) -> None:
    """The loss over the steps, with what evaluations measured; of a start state its spectra too."""
    if not pictures.available():
        print("no pictures: matplotlib is missing (pip install 'rwkv7_jax[plot]')")
        return
    rows = folder.rows()
    lines = _points(rows, "loss_nats", "training (bits per token)", scale=1 / math.log(2))
    lines |= _points(rows, "held_out_bits_per_byte", "held out (bits per byte)")
    shares = {}
    if "held out (bits per byte)" not in lines:
        names = dict.fromkeys(name for row in rows for name in row if name.endswith(_SHARES))
        for name in list(names)[:4]:
            shares |= _points(rows, name, name.replace("_", " "))
    pictures.curves(folder.path / "loss.png", lines, x="step", y="bits", shares=shares)
    if settings.mode == "state":
        typical = prefill_state(job.model, job.weights(trained), stream[: settings.data.length])
        pictures.states(
            folder.path / "state.png", singular_values(typical), singular_values(job.start(trained))
        )


def _points(rows: list[dict], name: str, label: str, *, scale: float = 1.0) -> dict:
    """The line of a number in the log, if it is there."""
    points = [(float(row["step"]), row[name] * scale) for row in rows if name in row]
    return {label: points} if points else {}
