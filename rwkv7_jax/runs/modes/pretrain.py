"""The mode that trains all weights."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import save_model
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.model_setup import (
    load_or_init,
    new_model,
    refuse_int8,
    tokenizer_of,
)
from rwkv7_jax.training.costs import parameter_count
from rwkv7_jax.training.losses import pretrain_loss
from rwkv7_jax.training.projection_statistics import weight_decorrelator

_RESULT = "model.pth"


class PretrainMode(TrainingMode):
    """Trains all weights, from new ones or from a checkpoint's."""

    gradients_of = "weights"

    result_names = (_RESULT,)

    def set_up(self) -> None:
        """Loads or makes the weights and opens the data."""
        settings = self.settings
        refuse_int8(settings.model, 'in mode "pretrain": integers cannot be trained')
        if settings.init is not None:
            # The sizes come from the checkpoint's tensors. A new run starts from the same weights,
            # so they are kept instead of reading the file twice.
            self.model, params = load_or_init(settings, self.mesh)
            self._initial = _in_float32(params)
        else:
            self.model = new_model(settings.model)
        self.tokenizer = tokenizer_of(settings, self.model.config)
        self.loss = pretrain_loss(self.model, l2wrap=settings.optimizer.l2wrap)
        self.decorrelator = weight_decorrelator(
            self.model,
            method=settings.optimizer.decorrelate,
            **dataclasses.asdict(settings.decorrelation),
        )
        self.open_data()

    def make_params(self) -> Params:
        """Makes new weights, or reads the checkpoint's, in float32."""
        return _in_float32(load_or_init(self.settings, self.mesh)[1])

    def trained_count(self, params: Params) -> int:
        """Counts all weights that the model reads."""
        return parameter_count(self.model.config)

    def save(
        self, folder: Path, params: Params, *, without: Sequence[str] = ()
    ) -> Path:
        """Writes the model and returns the file's path."""
        path = folder / _RESULT
        save_model(path, params, self.model.config, allow_nan=self.settings.allow_nan)
        return path


def _in_float32(params: Params) -> Params:
    # Updates of 16-bit weights would be rounded away. Activations still have `config.dtype`.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
