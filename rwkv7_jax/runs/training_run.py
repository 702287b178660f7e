"""The parts of a run of train.py that do not change between steps."""

import dataclasses
from typing import Any

import jax

from rwkv7_jax import sharding
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.registry import make_mesh_of, make_mode
from rwkv7_jax.runs.resume.run_identity import (
    Identity,
    content_digests,
    flat_settings,
    identity_of,
)
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.runs.settings import Settings
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
        ValueError: a setting does not fit the model, the data or the devices.
    """
    # Create the mesh first. If the rows do not divide among the devices, all processes then fail at
    # the same moment; a process that still loads its model would be aborted without a reason.
    settings = folder.settings
    mesh = make_mesh_of(settings)
    own = sharding.local_mesh(mesh)
    with sharding.use_mesh(own):
        mode = make_mode(settings, folder.path, own)
    named = {"evaluation": settings.data.evaluation, "start": settings.start}
    identity = identity_of(
        flat_settings(settings),
        mode.model.config,
        mode.tokenizer,
        frozen=mode.frozen,
        read={**mode.input_digests(), **content_digests(named)},
    )
    return TrainingRun(mode=mode, identity=identity, mesh=mesh)
