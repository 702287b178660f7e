"""The mode that trains all weights."""

from pathlib import Path

import jax
import jax.numpy as jnp

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import save_model
from rwkv7_jax.model.state import RWKV7State, init_state
from rwkv7_jax.runs.modes.base import DatasetMode, count, load_or_init
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.training.losses import pretrain_loss


class PretrainMode(DatasetMode):
    """Trains all weights, from new ones or from a checkpoint's."""

    gradients_of = "weights"

    def set_up(self) -> None:
        """Loads or makes the weights and opens the data."""
        settings = self.settings
        self.model, params = load_or_init(
            settings.init,
            settings.model,
            seed=settings.seed,
            allow_nan=settings.allow_nan,
        )
        self._initial = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
        self.tokenizer = Tokenizer.for_vocabulary(self.model.config.vocab_size)
        self.loss = pretrain_loss(self.model, l2wrap=settings.optimizer.l2wrap)
        self.open_data()
        self._held_out = self.prediction_evaluator("held_out")

    def init_trainables(self) -> Params:
        """Gives the weights in float32."""
        return self._initial

    def trained_count(self, trainables: Params) -> int:
        """Counts all weights."""
        return count(trainables)

    def weights(self, trainables: Params) -> Params:
        """Gives the weights themselves."""
        return trainables

    def start_state(self, trainables: Params) -> RWKV7State:
        """Gives a state of zeros."""
        return init_state(self.model.config)

    def held_out_metrics(self, trainables: Params) -> dict[str, float]:
        """Measures how well the held-out rows are predicted."""
        return self._held_out(trainables, self.start_state(trainables))

    def save(self, folder: Path, trainables: Params) -> Path:
        """Writes the model and gives the file's path."""
        path = folder / "model.pth"
        save_model(path, trainables, self.model.config)
        return path
