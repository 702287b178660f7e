"""The abstract step of a run: the run's mode, optimizer and step function, on shapes only."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from rwkv7_jax import sharding
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.int8_weights import quantize
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.registry import make_mesh_of, mode_class
from rwkv7_jax.runs.modes.stack import state_sources
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.training.train_step import TrainState

# Data of a plan in place of the run's data: ids that every vocabulary has.
_DATA = "task:mapping"
_VOCABULARY = "ids"

# A placeholder for a learning rate that the run searches for: it affects no shape.
_RATE = 1.0


class Step(NamedTuple):
    """A run's step, ready to compile.

    Attributes:
        mode: mode of the run.
        program: the jitted function.
        arguments: its abstract arguments, with their shardings.
        state: the abstract training state, one of the arguments.
        mesh: mesh of the devices that share the step; None for a single device.
        device: one of the devices.
    """

    mode: TrainingMode
    program: Any
    arguments: tuple[Any, ...]
    state: TrainState
    mesh: Mesh | None
    device: Any

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the mesh axes, by name."""
        return dict(sharding.sizes_of(self.mesh))

    @property
    def devices(self) -> list[Any]:
        """The devices that share the step."""
        return [self.device] if self.mesh is None else list(self.mesh.devices.flat)

    def on_target(self) -> contextlib.AbstractContextManager:
        """Sets the devices for which the kernels pick their implementation in a with block."""
        if self.mesh is not None:
            return sharding.use_mesh(self.mesh)
        alone = Mesh(np.array([self.device]), ("alone",))
        return jax.sharding.use_abstract_mesh(alone.abstract_mesh)

    def compile(self, platform: str) -> Any:
        """Compiles the step for its devices.

        Args:
            platform: lowering platform.
        """
        # With a mesh, the step itself sets it.
        alone = self.on_target() if self.mesh is None else contextlib.nullcontext()
        with alone:
            traced = self.program.trace(*self.arguments)
            return traced.lower(lowering_platforms=(platform,)).compile()


def describe_step(
    settings: Settings, config: RWKV7Config, dtype: str, devices: list[Any]
) -> Step:
    """Describes a run's step.

    Args:
        settings: settings of the run.
        config: config of its model.
        dtype: dtype of frozen weights.
        devices: devices to compile for; this machine need not have them.

    Raises:
        ValueError: a run rejects the settings.
    """
    mesh = make_mesh_of(settings, devices)
    with _without_numbers(settings, config, dtype) as mode:
        batch = mode.example_batch()
        _, tx = mode.optimizer()
        state = jax.eval_shape(
            lambda params: mode.train_state(params, tx), mode.abstract_params
        )
        # Its frozen arrays are abstract too; the step places them on the mesh.
        step = mode.update_step(tx, mesh)
    state = sharding.abstract_shards(mesh, _as_jax_holds(state))
    rows = sharding.abstract_rows(mesh, _as_jax_holds(batch))
    arguments = (*step.args, state, rows)
    if mesh is None:
        alone = SingleDeviceSharding(devices[0])
        arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=alone),
            _as_jax_holds(arguments),
        )
    return Step(
        mode=mode,
        program=step.func,
        arguments=arguments,
        state=state,
        mesh=mesh,
        device=devices[0],
    )


def _as_jax_holds(tree: Any) -> Any:
    """Describes the arrays of a tree with the dtypes that they have as JAX arrays."""

    def describe(leaf: Any) -> jax.ShapeDtypeStruct:
        kind = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, kind)

    return jax.tree.map(describe, tree)


@contextlib.contextmanager
def _without_numbers(settings: Settings, config: RWKV7Config, dtype: str):
    """Makes the mode of a run on abstract weights, with a synthetic task as its data."""
    kind = mode_class(settings)
    settings = _with_any_data(settings, config)
    base = None
    if settings.mode != "pretrain":
        frozen = describe_weights(config, dtype, settings.model.get("weights"))
        base = (RWKV7(config), frozen)
    with tempfile.TemporaryDirectory() as folder:
        yield kind(settings, Path(folder), base=base)


def describe_weights(config: RWKV7Config, dtype: str, form: str | None) -> Any:
    """Describes frozen weights.

    Args:
        config: config of the model.
        dtype: dtype of floats.
        form: "int8", or None for floats.
    """
    model = RWKV7(config)
    tokens = jnp.zeros((1, 1), jnp.int32)

    def make() -> Any:
        made = model.init(jax.random.key(0), tokens, init_state(config))["params"]
        made = jax.tree.map(lambda leaf: leaf.astype(dtype), made)
        return quantize(made) if form == "int8" else made

    return jax.eval_shape(make)


def _with_any_data(settings: Settings, config: RWKV7Config) -> Settings:
    """Returns the settings with a synthetic task in place of all data.

    A start state is still read: an upscaled one has further arrays.
    """
    states = settings.tuning.states
    if states is not None:
        states = dict.fromkeys(state_sources(states), _DATA)
    is_new = settings.mode == "pretrain"
    optimizer = settings.optimizer
    if settings.finds_rate:
        optimizer = dataclasses.replace(
            optimizer, learning_rate=_RATE, final_learning_rate=_RATE
        )
    return dataclasses.replace(
        settings,
        # Trained weights are float32, independent of the checkpoint.
        init=None if is_new else "the planned model",
        model=dataclasses.asdict(config) if is_new else settings.model,
        optimizer=optimizer,
        data=dataclasses.replace(
            settings.data,
            path="" if states else _DATA,
            evaluation=None,
            vocabulary=_VOCABULARY,
        ),
        tuning=dataclasses.replace(
            settings.tuning,
            states=states,
            anchor_path=_DATA if settings.tuning.anchor else None,
        ),
        evaluation=dataclasses.replace(settings.evaluation, windows=1, retention=""),
    )
