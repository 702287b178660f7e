"""What a run trains, and how it gets at the model it trains or tunes.

A mode of train.py is a tree of trainables and a loss over them; the loop there knows neither.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from optax import GradientTransformation

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import load_model, model_hash
from rwkv7_jax.checkpoints.state_files import save_state
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.training.costs import flops_per_token, training_memory
from rwkv7_jax.training.losses import Loss
from rwkv7_jax.tuning.state_arithmetic import scaled
from rwkv7_jax.tuning.upscaling import fold_feature_map


@dataclasses.dataclass(frozen=True)
class Job:
    """One run's work.

    Attributes:
        model: the shell.
        tokenizer: of the model's vocabulary.
        trainables: what is trained, as it starts.
        trained: how many numbers of it move.
        loss: of trainables and a batch.
        weights: the model's weights, from trainables.
        start: the start state (batch 1), from trainables.
        save: writes the result into a folder and gives the file's path.
        optimizer: what the run's optimizer is wrapped in.
        statistics: of trainables and a batch, for that optimizer; None where it needs none.
        batch: the batch of a step, counted from 0, where it depends on the trainables, or None for
            a step that has nothing to learn from; None where batches come from the data alone.
        prepared: a batch of the data with what the mode adds to it at a step.
        measured: from a batch of held-out data to what is measured of trainables, where that is not
            how well they predict it; the argument is None where `batch` makes the data.
    """

    model: RWKV7
    tokenizer: Tokenizer
    trainables: Any
    trained: int
    loss: Loss
    weights: Callable[[Any], Params]
    start: Callable[[Any], RWKV7State]
    save: Callable[[Path, Any], Path]
    optimizer: Callable[[GradientTransformation], GradientTransformation] = lambda tx: tx
    statistics: Callable[[Any, Batch], Any] | None = None
    batch: Callable[[Any, int], Batch | None] | None = None
    prepared: Callable[[Batch, int], Batch] = lambda batch, step: batch
    measured: Callable[[Batch | None], Callable[[Any], dict[str, float]]] | None = None


def count(tree: Any) -> int:
    """Numbers in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def load(settings: Settings) -> tuple[RWKV7, Params]:
    """The model of `config.init`, changed as `config.model` says, or a new one of those sizes.

    Raises:
        ValueError: neither is given, or a change that the checkpoint's sizes do not allow.
    """
    if settings.init:
        params, config = load_model(settings.init, allow_nan=settings.allow_nan)
        fixed = [k for k in settings.model if k not in ("dtype", "remat", "implementation")]
        if fixed:
            raise ValueError(
                f"`config.model.{fixed[0]}` is fixed by the checkpoint {settings.init}; "
                "only dtype, remat and implementation may be changed."
            )
        return RWKV7(dataclasses.replace(config, **settings.model)), params
    if not settings.model:
        raise ValueError("`config.init` must name a checkpoint, or `config.model` the new sizes.")
    model = RWKV7(RWKV7Config(**settings.model))
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = jax.jit(lambda key: model.init(key, tokens, init_state(model.config)))
    return model, init(jax.random.key(settings.seed))["params"]


def frozen_model(settings: Settings) -> tuple[RWKV7, Params]:
    """The checkpoint whose state is tuned.

    Raises:
        ValueError: none is named, or an anchor without text.
    """
    if not settings.init:
        raise ValueError("`config.init` must name the checkpoint whose start state is tuned.")
    if settings.tuning.anchor and not settings.tuning.anchor_path:
        raise ValueError("`config.tuning.anchor_path` must name the text of the anchor.")
    return load(settings)


def start_state(model: RWKV7) -> RWKV7State:
    """Zeros in float32, whatever the model computes in."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), init_state(model.config))


def saver(
    settings: Settings, model: RWKV7, params: Params, name: str = "state.pth"
) -> Callable[[Path, RWKV7State], Path]:
    """What writes the tuned state, scaled as `config.tuning.alpha` says and without its map."""
    alpha = settings.tuning.alpha

    def save(folder: Path, tuned: RWKV7State) -> Path:
        result, path = scaled(tuned, alpha), folder / name
        if result.upscaled is not None and result.upscaled.dynamics == "static":
            result = result.replace(upscaled=fold_feature_map(result.upscaled))
        info = {"base_model": model_hash(params, model.config), "alpha": alpha}
        save_state(path, result, config=model.config, info=info)
        return path

    return save


# Modes whose steps are one pass of one model, and what their gradients are of.
_TRAINED = {"pretrain": "weights", "state": "state", "upscaled_state": "state"}


def step_flops(settings: Settings, config: RWKV7Config) -> float | None:
    """Operations of a step per token; None for modes whose steps read more than they learn."""
    trained = _TRAINED.get(settings.mode)
    if trained is None or settings.tuning.anchor:
        return None
    flops = flops_per_token(config)
    return flops.training if trained == "weights" else flops.state


def step_rows(settings: Settings) -> int:
    """Rows that a step computes at once."""
    asked = settings.test_time
    if settings.mode == "test_time" and asked.method in ("grpo", "expert"):
        return asked.prompts * asked.group
    return settings.data.batch_size // settings.optimizer.accumulate


def memory_line(settings: Settings, config: RWKV7Config, held: int, *, devices: int = 1) -> str:
    """One step's memory on one device in words: what is held, and in all where one can tell.

    Args:
        settings: of the run.
        config: of its model.
        held: bytes of what is trained and its moments.
        devices: over which a step's rows are spread.
    """
    said = f"{held / 2**20:,.1f} MiB for what is trained and its moments"
    trained = _TRAINED.get(settings.mode)
    if trained is None:
        return said
    need = training_memory(
        config,
        batch=settings.data.batch_size // devices,
        length=settings.data.length,
        trained=trained,
        accumulate=settings.optimizer.accumulate,
    )
    return f"{said}, about {need.total / 2**20:,.0f} MiB in all"
