"""The lines that a run prints before its first step."""

from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from rwkv7_jax import sharding
from rwkv7_jax.optim.optimizer import group_table
from rwkv7_jax.runs.early_stopping import Progress
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.training.costs import parameter_count
from rwkv7_jax.training.train_step import TrainState


def print_summary(
    mode: TrainingMode,
    state: TrainState,
    progress: Progress,
    *,
    identity: Mapping[str, Mapping[str, str]],
    mesh: Mesh | None,
) -> None:
    """Prints what the run trains, on which data and devices, and from which step on.

    Args:
        mode: of the run.
        state: new or restored.
        progress: of the run so far.
        identity: of the run, with the digest of its data.
        mesh: the devices of the run; None for one device.
    """
    settings = mode.settings
    start = int(state.step)
    weights = parameter_count(mode.model.config)
    trained = mode.trained_count(state.params)
    held = sharding.bytes_on_a_device(state) / 2**20
    memory = f"{held:,.1f} MiB for the trained parameters and their moments"
    need = mode.memory_estimate(mesh)
    if need is not None:
        memory += f", about {need.total / 2**20:,.0f} MiB in all"
    devices = 1 if mesh is None else mesh.size
    print(
        f"devices   {devices} of {jax.device_count()}: {jax.devices()[0].device_kind}"
    )
    if mesh is not None:
        print(f"mesh      {describe_mesh(mesh, (state.params, mode.frozen))}")
    print(f"model     {mode.model.config}")
    print(
        f"trained   {trained:,} parameters in mode {settings.mode}; the model has {weights:,}"
    )
    print(f"memory    {memory}")
    if settings.mode == "pretrain":
        print(group_table(state.params))
    print(f"data      {mode.describe_data()}, hash {identity['inputs']['data']}")
    tokens = mode.tokens_per_step
    size = "" if tokens is None else f", {tokens:,} tokens each"
    print(f"steps     {start} to {settings.steps}{size}")
    if not start:
        print("resume    no: a new run", flush=True)
        return
    best = ""
    single = progress.states.get("")
    if single is not None and single.best:
        value, step = single.best[0]
        best = f"; best so far: {value:.4g} at {step}"
    print(f"resume    from step {start}{best}", flush=True)


def describe_mesh(mesh: Mesh, tree: object) -> str:
    """Describes the sizes of a mesh, and the weights that it cannot shard.

    Args:
        mesh: of the run.
        tree: weights and trained parameters.
    """
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    names = []
    for one in sharding.undivided(mesh, tree):
        # Without the layer, because all layers have the same sizes.
        name = one.name.removesuffix("/weight").rpartition("/")[2]
        names.append(f"{name} ({one.size} by {one.axis} {mesh.shape[one.axis]})")
    if not names:
        return sizes
    listed = ", ".join(dict.fromkeys(names))
    return f"{sizes}; replicated where sizes do not divide: {listed}"
