"""The lines that a run prints before its first step."""

from collections.abc import Mapping

import jax

from rwkv7_jax.optim.optimizer import group_table
from rwkv7_jax.runs.early_stopping import Progress, RunProgress
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.training.costs import parameter_count
from rwkv7_jax.training.train_step import TrainState


def print_summary(
    mode: TrainingMode,
    state: TrainState,
    progress: Progress,
    *,
    identity: Mapping[str, Mapping[str, str]],
    devices: int,
) -> None:
    """Prints what will be trained, on which data and devices, and from which step on.

    Args:
        mode: of the run.
        state: new or restored.
        progress: of the run so far.
        identity: of the run, with the digest of its data.
        devices: how many share a step's rows.
    """
    settings = mode.settings
    start = int(state.step)
    weights = parameter_count(mode.model.config)
    trained = mode.trained_count(state.params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(
        f"devices   {devices} of {jax.device_count()}: {jax.devices()[0].device_kind}"
    )
    print(f"model     {mode.model.config}")
    print(
        f"trained   {trained:,} numbers in mode {settings.mode}, of a model of {weights:,}"
    )
    print(f"memory    {mode.describe_memory(held, devices=devices)}")
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
    if isinstance(progress, RunProgress) and progress.best:
        value, step = progress.best[0]
        best = f"; best so far: {value:.4g} at {step}"
    print(f"resume    from step {start}{best}", flush=True)
