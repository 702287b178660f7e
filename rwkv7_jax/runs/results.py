"""The result of a run: which parameters it is, and how it is saved."""

from typing import Any

from rwkv7_jax.runs.early_stopping import RunProgress
from rwkv7_jax.runs.exit_codes import DiskError, NoValidCheckpoint, warn
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.monitoring.run_plots import draw
from rwkv7_jax.runs.resume.run_identity import Identity
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.training.train_step import TrainState


def final_params(
    mode: TrainingMode,
    state: TrainState,
    progress: RunProgress,
    folder: RunDirectory,
    identity: Identity,
) -> Any:
    """Gives the result of a run: the last parameters, or with patience the best ones."""
    if not (mode.settings.evaluation.patience and progress.best):
        return state.params
    best = progress.best[0][1]
    if best == int(state.step):
        return state.params
    print(f"step {best} measured best: the result is that of this step")
    # Step 0 has no checkpoint; it is made again.
    if best <= 0:
        return mode.init_params()
    try:
        return folder.checkpoints.load(best, state, identity).params
    except NoValidCheckpoint as error:
        # The last parameters are better than none after a long run.
        warn(f"{error}; the result is that of the last step, {int(state.step)}")
        return state.params


def save_result(
    mode: TrainingMode,
    state: TrainState,
    progress: RunProgress,
    folder: RunDirectory,
    identity: Identity,
) -> None:
    """Saves the result of a run and draws the picture of it.

    Raises:
        DiskError: the result cannot be written.
    """
    params = final_params(mode, state, progress, folder, identity)
    # Somebody may have deleted the folder while the run worked.
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        result = mode.save(folder.path, params)
    except OSError as error:
        raise DiskError(f"the result cannot be written: {error}.") from None
    print(f"saved {result}")
    try:
        draw(folder, mode, params)
    except OSError as error:
        warn(f"the picture of the state cannot be written: {error}")
