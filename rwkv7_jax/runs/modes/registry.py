"""Training modes by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from rwkv7_jax import sharding
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.observer import ObserverMode
from rwkv7_jax.runs.modes.pretrain import PretrainMode
from rwkv7_jax.runs.modes.stack import StackMode, state_sources
from rwkv7_jax.runs.modes.state_tuning import StateTuningMode, UpscaledStateMode
from rwkv7_jax.runs.modes.test_time import ContextMode, TestTimeMode
from rwkv7_jax.runs.settings import Mode, Settings

MODES: dict[Mode, type[TrainingMode]] = {
    "pretrain": PretrainMode,
    "state": StateTuningMode,
    "upscaled_state": UpscaledStateMode,
    "observer": ObserverMode,
    "test_time": TestTimeMode,
}


def make_mode(
    settings: Settings, folder: str | Path = ".", mesh: Mesh | None = None
) -> TrainingMode:
    """Makes the mode that `config.mode` names.

    Args:
        settings: settings of the run.
        folder: the run directory, where mode "test_time" keeps a teacher's completions.
        mesh: the devices of this process that hold the weights; None for a single device.

    Raises:
        ValueError: the mode rejects the settings or the data.
    """
    return mode_class(settings)(settings, Path(folder), mesh=mesh)


def mode_class(settings: Settings) -> type[TrainingMode]:
    """Returns the class of the mode that the settings name."""
    if settings.tuning.states is not None:
        return StackMode
    # The only test-time method that reads text instead of questions.
    if settings.mode == "test_time" and settings.test_time.method == "context":
        return ContextMode
    return MODES[settings.mode]


def make_mesh_of(
    settings: Settings, devices: Sequence[Any] | None = None
) -> Mesh | None:
    """Makes the mesh of a run, whose devices share the rows of a step or the states of a stack.

    Args:
        settings: settings of the run.
        devices: the devices; None for all.

    Raises:
        ValueError: as `sharding.make_mesh`.
    """
    choice = sharding.parse_sizes(settings.mesh, "`config.mesh`")
    states = settings.tuning.states
    if states is None:
        return sharding.make_mesh(choice, settings.rows_per_step, devices)
    count = len(state_sources(states))
    return sharding.make_mesh(choice, count, devices, are_sets=True)
