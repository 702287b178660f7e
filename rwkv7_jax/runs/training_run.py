"""The parts of a run of train.py that do not change between steps."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from rwkv7_jax import sharding
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.registry import make_mesh_of, make_mode, mode_class
from rwkv7_jax.runs.process_group import ProcessGroup, group_of_run
from rwkv7_jax.runs.replaced_inputs import refuse_replaced_inputs
from rwkv7_jax.runs.resume.run_identity import (
    Identity,
    content_digests,
    flat_settings,
    identity_of,
)
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.runs.same_in_all import require_same_inputs
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.training.train_step import TrainState


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What a run trains, and on which devices.

    Attributes:
        mode: the parameters, their loss and their batches.
        identity: what a resumed run must have in common with the original.
        mesh: the devices that share the rows of a step and hold the weights; None for one device.
    """

    mode: TrainingMode
    identity: Identity
    mesh: jax.sharding.Mesh | None

    @property
    def settings(self) -> Settings:
        """The settings of the mode."""
        return self.mode.settings

    def local_params(self, state: TrainState) -> Any:
        """Returns the trained parameters, placed on this process's devices that hold the model."""
        # A learning-rate search may place its states on other devices than the model's.
        params = sharding.local_view(self.mesh, state.params)
        return sharding.place(self.mode.mesh, params)


def set_up(folder: RunDirectory) -> TrainingRun:
    """Loads the model and the data of a run.

    Args:
        folder: of the run, with its settings.

    Raises:
        ValueError: a setting does not fit the model, the data or the devices, the result would
            replace an input, or the processes read different models or data.
        EndedElsewhere: another process failed to load them.
    """
    # Create the mesh first. If the rows do not divide among the devices, all processes then fail at
    # the same moment; a process that still loads its model would be aborted without a reason.
    settings = folder.settings
    mesh = make_mesh_of(settings)
    own = sharding.local_mesh(mesh)
    group = group_of_run()
    group.run_in_all(lambda: refuse_own_result(folder.path, settings))

    def load() -> tuple[TrainingMode, Identity]:
        with sharding.use_mesh(own):
            mode = make_mode(settings, folder.path, own)
        return mode, _identity_of(mode)

    # Weights that processes share are read together: one that fails cannot tell the others.
    loading = ProcessGroup() if sharding.is_shared(mesh) else group
    with report_wait("the model and the data, and their digests"):
        mode, identity = loading.run_in_all(load)
    require_same_inputs(group, identity)
    return TrainingRun(mode=mode, identity=identity, mesh=mesh)


def refuse_own_result(folder: Path, settings: Settings) -> None:
    """Checks that a run will not replace what it reads by its result.

    Args:
        folder: the run directory.
        settings: of the run.

    Raises:
        ValueError: it would.
    """
    results = [folder / name for name in mode_class(settings).result_names]
    refuse_replaced_inputs(results, settings, "`--workdir`")


def _identity_of(mode: TrainingMode) -> Identity:
    """Returns the identity of the run of a mode that has loaded its model and data."""
    settings = mode.settings
    named = {"evaluation": settings.data.evaluation, "start": settings.start}
    return identity_of(
        flat_settings(settings),
        mode.model.config,
        mode.tokenizer,
        frozen=mode.frozen,
        read={**mode.input_digests(), **content_digests(named)},
    )
