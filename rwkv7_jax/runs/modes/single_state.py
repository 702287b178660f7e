"""The common part of the modes that tune one state of a frozen model."""

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import model_hash
from rwkv7_jax.checkpoints.state_files import save_state
from rwkv7_jax.model.state import RWKV7State, init_state
from rwkv7_jax.optim.decorrelation import Decorrelator
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.start_state import read_start_state
from rwkv7_jax.runs.settings.readers import TEST_TIME
from rwkv7_jax.training.losses import Loss
from rwkv7_jax.tuning.rate_factors import rate_factors, with_rate_factors
from rwkv7_jax.tuning.read_statistics import state_decorrelator
from rwkv7_jax.tuning.state_arithmetic import scaled
from rwkv7_jax.tuning.state_tuning import LEAVES, trainable_mask
from rwkv7_jax.tuning.upscaling import fold_feature_map

_RESULT = "state.pth"

# The other formats cannot hold features.
_UPSCALED_RESULT = "state.safetensors"


class SingleStateMode(TrainingMode):
    """A mode that tunes one start state of a frozen model.

    Attributes:
        tuned_leaves: the tuned leaves, of `LEAVES`; for an upscaled state, only the memory.
        result_name: name of the file with the tuned state.
    """

    tunes_state = True

    result_names = (_RESULT, _UPSCALED_RESULT)

    frozen: Params
    tuned_leaves: tuple[str, ...]
    result_name: str

    def set_up(self) -> None:
        """Loads the model whose state is tuned, and opens the data."""
        tuning = self.settings.tuning
        if tuning.anchor and tuning.anchor_path is None:
            raise ValueError(
                "`config.tuning.anchor_path` must name a text if `config.tuning.anchor` is above 0."
            )
        self.load_frozen("whose start state is tuned")
        layers = self.model.config.num_layers
        factors = len(tuning.layer_rates)
        if factors not in (0, layers):
            raise ValueError(
                "`config.tuning.layer_rates` must have one factor for each of the model's "
                f"{layers} layers; got {factors}."
            )
        self.open_data()

    def prepare(self) -> None:
        """Makes the initial state, the loss and the decorrelator.

        Raises:
            ValueError: the settings do not fit the state that tuning starts from.
        """
        self._initial = self.make_params()
        self.choose_leaves(is_upscaled=self._initial.upscaled is not None)
        self.loss = self.make_loss()
        self.decorrelator = self.make_decorrelator()
        super().prepare()

    def choose_leaves(self, *, is_upscaled: bool) -> None:
        """Sets the tuned leaves and the name of the result.

        Args:
            is_upscaled: whether tuning starts from an upscaled state.

        Raises:
            ValueError: a leaf with a factor on the learning rate is not tuned.
        """
        tuning = self.settings.tuning
        if is_upscaled:
            self.tuned_leaves = ("memory",)
            self.result_name = _UPSCALED_RESULT
        else:
            tunes_all = tuning.leaves == "all"
            # The rest of `LEAVES` belongs to upscaled states.
            self.tuned_leaves = LEAVES[:3] if tunes_all else ("wkv",)
            self.result_name = _RESULT
        for name in tuning.leaf_rates:
            if name not in self.tuned_leaves:
                raise ValueError(
                    "`config.tuning.leaf_rates` must have only tuned leaves, "
                    f"{', '.join(self.tuned_leaves)}; got {name!r}."
                )

    @abc.abstractmethod
    def make_loss(self) -> Loss:
        """Makes the loss of the tuned leaves."""

    def make_params(self) -> RWKV7State:
        """Makes a state of zeros, or reads `config.start`; always in float32."""
        settings = self.settings
        if settings.start is None:
            # The token-shift states have the model's dtype, in which small updates may be rounded
            # away.
            zeros = init_state(self.model.config)
            return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), zeros)
        state = read_start_state(
            settings.start,
            self.model,
            self.frozen,
            self.tokenizer,
            any_base=settings.any_base,
            may_be_upscaled=settings.mode == TEST_TIME,
        )
        if state.upscaled is not None:
            self._check_upscaled_start()
        return state

    def _check_upscaled_start(self) -> None:
        """Raises if the settings tune other leaves, or calibrate the features again."""
        if self.settings.tuning.leaves == "all":
            raise ValueError(
                "`config.tuning.leaves` must be left out if `config.start` is an upscaled state, "
                "of which only the memory is tuned; got all."
            )
        if self.settings.tuning.decorrelate == "whiten":
            raise ValueError(
                '`config.tuning.decorrelate` must be "none" or "dbp" if `config.start` is an '
                "upscaled state, whose features are already calibrated; got whiten."
            )

    def make_decorrelator(self) -> Decorrelator:
        """Makes the decorrelator of the tuned leaves, with their learning rate factors."""
        settings = self.settings
        tuning = settings.tuning
        decorrelator = self.decorrelator
        # Without one, test time keeps moments of all leaves, so that runs of earlier versions can
        # resume.
        if settings.mode != TEST_TIME or tuning.decorrelate != "none":
            decorrelator = state_decorrelator(
                self.model,
                self.frozen,
                self._initial,
                leaves=self.tuned_leaves,
                method=tuning.decorrelate,
                **dataclasses.asdict(settings.decorrelation),
            )
        if not tuning.leaf_rates and not tuning.layer_rates:
            # Keeps the optimizer state of earlier versions, which had no factors.
            return decorrelator
        factors = rate_factors(
            self._initial,
            leaf_rates=tuning.leaf_rates,
            layer_rates=tuning.layer_rates,
        )
        return with_rate_factors(decorrelator, factors)

    def trained_count(self, params: RWKV7State) -> int:
        """Counts the numbers of the tuned leaves."""
        mask = trainable_mask(params, self.tuned_leaves)
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True)
        # By mask, not by name: "memory" covers two arrays of an upscaled state.
        return sum(leaf.size for leaf, tuned in pairs if tuned)

    def start_state(self, params: RWKV7State) -> RWKV7State:
        """Returns the tuned state."""
        return params

    def save(
        self, folder: Path, params: RWKV7State, *, without: Sequence[str] = ()
    ) -> Path:
        """Writes the tuned state, scaled by `config.tuning.alpha`, and returns the file's path."""
        path = folder / self.result_name
        base_model = model_hash(self.frozen, self.model.config)
        self.save_state(path, params, base_model=base_model)
        return path

    def state_files(self, folder: Path) -> dict[str, Path]:
        """Returns the file of the tuned state, under the name ""."""
        return {"": folder / self.result_name}

    def save_state(self, path: Path, params: RWKV7State, *, base_model: str) -> None:
        """Writes the tuned state, scaled by `config.tuning.alpha`, to a file.

        Args:
            path: path of the file.
            params: the state.
            base_model: hash of the frozen model.
        """
        alpha = self.settings.tuning.alpha
        # Checkpoints hold the unscaled state, from which a run resumes.
        result = scaled(params, alpha)
        # A static memory is linear in its features, so their whitening map can be folded into it.
        if result.upscaled is not None and not result.upscaled.form.has_own_rows:
            result = result.replace(upscaled=fold_feature_map(result.upscaled))
        info = {"base_model": base_model, "alpha": alpha}
        save_state(path, result, config=self.model.config, info=info)
