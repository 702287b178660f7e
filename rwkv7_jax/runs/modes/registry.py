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
        settings: of the run.
        folder: of the run, where mode "test_time" keeps a teacher's completions.
        mesh: the devices of this process that hold the weights; None for a single one.

    Raises:
        ValueError: settings that the mode cannot work with.
    """
    return mode_class(settings)(settings, Path(folder), mesh=mesh)


def mode_class(settings: Settings) -> type[TrainingMode]:
    """Returns the class of the mode that settings name."""
    if settings.tuning.states is not None:
        return StackMode
    # The one method of test-time tuning that reads text in place of questions.
    if settings.mode == "test_time" and settings.test_time.method == "context":
        return ContextMode
    return MODES[settings.mode]


def make_mesh_of(
    settings: Settings, devices: Sequence[Any] | None = None
) -> Mesh | None:
    """Makes the mesh of a run, whose devices share the rows of a step or the states of a stack.

    Args:
        settings: of the run.
        devices: all by default.

    Raises:
        ValueError: as `sharding.make_mesh`.
    """
    choice = sharding.parse_sizes(settings.mesh, "`config.mesh`")
    states = settings.tuning.states
    if states is None:
        return sharding.make_mesh(choice, settings.rows_per_step, devices)
    count = len(state_sources(states))
    return sharding.make_mesh(choice, count, devices, are_sets=True)
