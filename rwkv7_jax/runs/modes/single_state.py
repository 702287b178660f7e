"""What the modes share that tune one state of a frozen model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import model_hash
from rwkv7_jax.checkpoints.state_files import save_state
from rwkv7_jax.model.state import RWKV7State, init_state
from rwkv7_jax.optim.decorrelation import Decorrelator
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.model_setup import load_frozen, tokenizer_of
from rwkv7_jax.runs.modes.start_state import read_start_state
from rwkv7_jax.runs.settings.readers import TEST_TIME
from rwkv7_jax.tuning.rate_factors import rate_factors, with_rate_factors
from rwkv7_jax.tuning.read_statistics import state_decorrelator
from rwkv7_jax.tuning.state_arithmetic import scaled
from rwkv7_jax.tuning.state_tuning import LEAVES, trainable_mask
from rwkv7_jax.tuning.upscaling import fold_feature_map

# Of an upscaled state.
UPSCALED_RESULT = "state.safetensors"


class SingleStateMode(TrainingMode):
    """A mode that tunes one start state of a frozen model.

    Attributes:
        result_name: of the file with the tuned state.
        takes_upscaled_start: whether `config.start` may name an upscaled state.
    """

    result_name: str = "state.pth"
    takes_upscaled_start: ClassVar[bool] = False
    tunes_state = True
    # Whether the memory of an upscaled state is tuned, which `config.start` decides.
    _tunes_memory = False

    frozen: Params

    def load_frozen_model(self) -> None:
        """Loads the model whose state is tuned.

        Raises:
            ValueError: no checkpoint is named, or an anchor has no text.
        """
        settings = self.settings
        if settings.tuning.anchor and settings.tuning.anchor_path is None:
            raise ValueError(
                "`config.tuning.anchor_path` must name the text of the anchor."
            )
        self.model, self.frozen = self._base or load_frozen(
            settings, "whose start state is tuned", mesh=self.mesh
        )
        self.tokenizer = tokenizer_of(settings, self.model.config)

    def make_params(self) -> RWKV7State:
        """Makes a state of zeros or reads that of `config.start`, in float32 always."""
        settings = self.settings
        if settings.start is not None:
            return read_start_state(
                settings.start,
                self.model,
                self.frozen,
                self.tokenizer,
                any_base=settings.any_base,
                may_be_upscaled=self.takes_upscaled_start,
            )
        # Its token shifts have the model's dtype, in which small updates would be rounded away.
        zeros = init_state(self.model.config)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), zeros)

    def make_initial(self) -> None:
        """Makes the first parameters; of an upscaled state the memory is tuned.

        Raises:
            ValueError: leaves are asked for that are not tuned, or features to be calibrated again.
        """
        self._initial = self.make_params()
        if self._initial.upscaled is None:
            return
        if self.settings.tuning.leaves == "all":
            raise ValueError(
                "`config.tuning.leaves` must be left out where `config.start` is an upscaled "
                "state: its memory is tuned alone; got all."
            )
        if self.settings.tuning.decorrelate == "whiten":
            raise ValueError(
                '`config.tuning.decorrelate` must be "none" or "dbp" where `config.start` is an '
                "upscaled state, whose features were calibrated before; got whiten."
            )
        self._tunes_memory = True
        # The other formats have no place for features.
        self.result_name = UPSCALED_RESULT

    def tuned_leaves(self) -> tuple[str, ...]:
        """Names the tuned leaves: the WKV state, and the token-shift states where asked for.

        Of an upscaled start state it is the memory alone; `make_initial` comes before.
        """
        if self._tunes_memory:
            return ("memory",)
        # The rest of `LEAVES` belongs to upscaled states.
        return LEAVES[:3] if self.settings.tuning.leaves == "all" else ("wkv",)

    def make_decorrelator(self) -> Decorrelator:
        """Prepares the optimizer of the tuned leaves as the settings say.

        The first parameters have been made: reading those of `config.start` cannot be traced.

        Raises:
            ValueError: a leaf that is not tuned, or another number of layers than the model's.
        """
        settings = self.settings
        method = settings.tuning.decorrelate
        if settings.mode == TEST_TIME and method == "none":
            # With moments of all leaves, as in runs of earlier versions, which go on.
            return self._with_own_rates(self.decorrelator)
        decorrelator = state_decorrelator(
            self.model,
            self.frozen,
            self._initial,
            leaves=self.tuned_leaves(),
            method=method,
            **dataclasses.asdict(settings.decorrelation),
        )
        return self._with_own_rates(decorrelator)

    def _with_own_rates(self, decorrelator: Decorrelator) -> Decorrelator:
        """Adds the learning rates that the settings give to leaves and layers."""
        tuning = self.settings.tuning
        if not tuning.leaf_rates and not tuning.layer_rates:
            # Without them the optimizer's state is that of runs before there were any.
            return decorrelator
        for name in tuning.leaf_rates:
            if name not in self.tuned_leaves():
                raise ValueError(
                    "`config.tuning.leaf_rates` must be of leaves that are tuned, "
                    f"{', '.join(self.tuned_leaves())}; got {name!r}."
                )
        layers = self.model.config.num_layers
        if tuning.layer_rates and len(tuning.layer_rates) != layers:
            raise ValueError(
                "`config.tuning.layer_rates` must have a number for each of the model's "
                f"{layers} layers; got {len(tuning.layer_rates)}."
            )
        factors = rate_factors(
            self._initial,
            leaf_rates=tuning.leaf_rates,
            layer_rates=tuning.layer_rates,
        )
        return with_rate_factors(decorrelator, factors)

    def trained_count(self, params: RWKV7State) -> int:
        """Counts the numbers of the tuned leaves."""
        mask = trainable_mask(params, self.tuned_leaves())
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True)
        # By the mask and not by names: "memory" stands for two arrays of an upscaled state.
        return sum(leaf.size for leaf, tuned in pairs if tuned)

    def weights(self, params: RWKV7State) -> Params:
        """Returns the frozen weights."""
        return self.frozen

    def start_state(self, params: RWKV7State) -> RWKV7State:
        """Returns the tuned state."""
        return params

    def save(
        self, folder: Path, params: RWKV7State, *, without: Sequence[str] = ()
    ) -> Path:
        """Writes the tuned state, scaled by `config.tuning.alpha`, and returns the file's path."""
        path = folder / self.result_name
        self.save_state(path, params, base_model=self.base_hash())
        return path

    def state_files(self, folder: Path) -> dict[str, Path]:
        """Returns the file of the tuned state, which has no name."""
        return {"": folder / self.result_name}

    def base_hash(self) -> str:
        """Computes the hash of the frozen model, which files of its states name."""
        return model_hash(self.frozen, self.model.config)

    def save_state(self, path: Path, params: RWKV7State, *, base_model: str) -> None:
        """Writes the tuned state, scaled by `config.tuning.alpha`, to a file.

        Args:
            path: of the file.
            params: the state.
            base_model: from `base_hash`.
        """
        alpha = self.settings.tuning.alpha
        # Only in the file: checkpoints hold the unscaled state, from which a run goes on.
        result = scaled(params, alpha)
        # A static memory is linear in its features, so the map that whitens them folds into it and
        # the file needs no map.
        if result.upscaled is not None and not result.upscaled.form.has_own_rows:
            result = result.replace(upscaled=fold_feature_map(result.upscaled))
        info = {
            "base_model": base_model,
            "alpha": alpha,
        }
        save_state(path, result, config=self.model.config, info=info)
