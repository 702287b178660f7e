"""The mode that trains all weights."""

from pathlib import Path

import jax
import jax.numpy as jnp

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import save_model
from rwkv7_jax.model.state import init_state
from rwkv7_jax.runs.modes.base import Job, count, load
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.training.losses import pretrain_loss


def pretrain_job(settings: Settings) -> Job:
    """Weights are trained, from new ones or a checkpoint's."""
    model, params = load(settings)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)

    def save(folder: Path, trained: Params) -> Path:
        save_model(folder / "model.pth", trained, model.config)
        return folder / "model.pth"

    return Job(
        model=model,
        tokenizer=Tokenizer.for_vocabulary(model.config.vocab_size),
        trainables=params,
        trained=count(params),
        loss=pretrain_loss(model, l2wrap=settings.optimizer.l2wrap),
        weights=lambda trained: trained,
        start=lambda trained: init_state(model.config),
        save=save,
    )
