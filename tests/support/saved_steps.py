"""Small training states, saved as the checkpoints of a run."""

from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rwkv7_jax.runs.early_stopping import Progress, StateProgress
from rwkv7_jax.runs.resume.checkpointer import Checkpointer
from rwkv7_jax.runs.resume.step_directories import StepDirectories
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.training.train_step import TrainState

IDENTITY = {"settings": {"seed": "0"}, "model": {"width": "32"}}
PROGRESS = Progress(
    {"": StateProgress(evaluated=2, measure="nats", best=((0.5, 2),), bad=1)}
)


def train_state(step: int) -> TrainState:
    """Makes a state with leaves of several sizes, dtypes and numbers of axes."""
    noise = np.random.default_rng(step)
    params = {
        "matrix": jnp.asarray(noise.normal(size=(24, 40)), jnp.float32),
        "half": jnp.asarray(noise.normal(size=(7,)), jnp.bfloat16),
    }
    moments = {"mu": jnp.asarray(noise.normal(size=(24, 40)), jnp.float32)}
    count = jnp.asarray(step, jnp.int32)
    return TrainState(
        step=count, params=params, opt_state=(moments, count), skipped=count
    )


def new_state() -> TrainState:
    """Makes the state of a run that has not made a step."""
    return train_state(0)


def open_checkpoints(folder: Path, **settings) -> Checkpointer:
    """Opens the folder as a run with these settings does."""
    steps = StepDirectories(folder)
    return Checkpointer(steps, folder.parent, Settings(**settings))


def save_steps(
    folder: Path, steps: Iterable[int], progress: Progress = PROGRESS, **settings
) -> Path:
    """Saves these steps into the folder and returns it."""
    checkpoints = open_checkpoints(folder, **settings)
    for step in steps:
        checkpoints.save(train_state(step), progress, IDENTITY)
    checkpoints.close()
    return folder


def files_of(step_folder: Path) -> list[Path]:
    """Lists all files of a step."""
    return sorted(path for path in step_folder.rglob("*") if path.is_file())


def damage(path: Path, how: str | int) -> None:
    """Flips one bit of a file, truncates it, empties it of its bits or deletes it."""
    raw = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "zero":
        path.write_bytes(bytes(len(raw)))
    else:
        raw[how // 8] ^= 1 << how % 8
        path.write_bytes(raw)
