"""The step of a run, described: the run's own mode, optimizer and step, without any numbers."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.int8_weights import quantize
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.runs.modes.base import LoadedModel, TrainingMode
from rwkv7_jax.runs.modes.registry import MODES
from rwkv7_jax.runs.modes.stack import StackMode, state_sources
from rwkv7_jax.runs.settings import Settings

# The modes whose step follows from sizes alone. A memory is fitted to text and a step at test time
# follows from what the model writes, before their shapes are known.
PLANNED = ("pretrain", "state")

# What a plan reads in the place of the run's data: rows of ids that any vocabulary has.
_DATA = "task:mapping"
_VOCABULARY = "ids"

# A rate that stands for the one that a run finds: rates change no shape.
_RATE = 1.0


class Step(NamedTuple):
    """A run's step, ready to be compiled.

    Attributes:
        mode: of the run.
        program: the jitted function.
        arguments: of it, described, with the devices that they are on.
        mesh: of the devices.
    """

    mode: TrainingMode
    program: Any
    arguments: tuple[Any, ...]
    mesh: Mesh

    def compile(self, platform: str) -> Any:
        """Compiles the step for its devices.

        Args:
            platform: as lowering calls it.
        """
        # It tells the kernels, which choose by it, what they are compiled for.
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            traced = self.program.trace(*self.arguments)
            return traced.lower(lowering_platforms=(platform,)).compile()


def check_mode(settings: Settings) -> None:
    """Raises unless the mode's step can be planned.

    Raises:
        ValueError: it cannot.
    """
    if settings.mode not in PLANNED:
        raise ValueError(
            f"`config.mode` must be one of {', '.join(PLANNED)} for a plan; got "
            f"{settings.mode!r}, whose shapes are known only once it reads its data."
        )


def describe_step(
    settings: Settings, config: RWKV7Config, dtype: str, devices: list[Any]
) -> Step:
    """Describes a run's step.

    Args:
        settings: of the run.
        config: of its model.
        dtype: of frozen weights.
        devices: which the step is made for; they need not be there.

    Raises:
        ValueError: settings that a run cannot work with.
    """
    with _without_numbers(settings, config, dtype) as mode:
        source = mode.batches(0, None)
        with contextlib.closing(source):
            batch = source.batch(0, None)
        assert batch is not None
        _, tx = mode.optimizer()
        state = jax.eval_shape(
            lambda params: mode.train_state(params, tx), mode.abstract_params
        )
        step = mode.train_step(tx, None)
    mesh = Mesh(np.array(devices), ("data",))
    sharding = SingleDeviceSharding(devices[0])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        kind = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=sharding)

    arguments = jax.tree.map(place, (*step.args, state, batch.host))
    return Step(mode, step.func, arguments, mesh)


@contextlib.contextmanager
def _without_numbers(settings: Settings, config: RWKV7Config, dtype: str):
    """Makes the mode of a run around shapes, with rows of a task in place of its data."""
    kind = MODES[settings.mode] if settings.tuning.states is None else StackMode
    settings = _with_any_data(settings, config)
    base = None
    if settings.mode != "pretrain":
        frozen = describe_weights(config, dtype, settings.model.get("weights"))
        base = LoadedModel(RWKV7(config), frozen)
    with tempfile.TemporaryDirectory() as folder:
        yield kind(settings, Path(folder), base=base)


def describe_weights(config: RWKV7Config, dtype: str, form: str | None) -> Any:
    """Describes frozen weights.

    Args:
        config: of the model.
        dtype: of floats.
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
    """Returns the settings with a task in place of all data, and without what reads files."""
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
        # Weights that are trained are float32 whatever the checkpoint holds.
        init=None if is_new else "the planned model",
        model=dataclasses.asdict(config) if is_new else settings.model,
        start=None,
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
