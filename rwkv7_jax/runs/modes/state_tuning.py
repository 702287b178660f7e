"""The modes that tune a start state or an upscaled state on text."""

import dataclasses
from collections.abc import Mapping

import jax

from rwkv7_jax import sharding
from rwkv7_jax.evaluation.metric import Metrics
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.runs.modes.single_state import SingleStateMode
from rwkv7_jax.training.costs import Memory
from rwkv7_jax.training.losses import Loss
from rwkv7_jax.tuning.calibration import resolve_features
from rwkv7_jax.tuning.state_tuning import state_loss
from rwkv7_jax.tuning.upscaling import describe_upscaled, upscale

# Copies of a layer's features, for all tokens, that are live in the backward pass.
_FEATURE_COPIES = 3


class StateTuningMode(SingleStateMode):
    """Tunes a start state."""

    gradients_of = "state"

    def make_loss(self) -> Loss:
        """Makes the loss on the text and on the anchor."""
        return state_loss(
            self.model,
            self.frozen,
            leaves=self.tuned_leaves,
            anchor=self.settings.tuning.anchor,
            l2wrap=self.settings.optimizer.l2wrap,
        )

    def losses(self, params: RWKV7State, *, windows: int) -> Metrics:
        """Measures the loss on some windows of each evaluation text."""
        metrics: Metrics = {}
        for evaluator in (self._held_out, *self._retention):
            metrics |= evaluator.loss(self.frozen, params, windows=windows)
        return metrics

    def guess(self, *, windows: int) -> float:
        """Computes the first of `losses` for predicting each token by its frequency."""
        return self._held_out.guess(windows=windows)


class UpscaledStateMode(StateTuningMode):
    """Tunes a memory that is read through kernel features; the start state stays as it was."""

    def set_up(self) -> None:
        """Loads the model and the data, and checks the settings before the calibration."""
        super().set_up()
        self.choose_leaves(is_upscaled=True)

    def step_memory(self, rows: int, sizes: Mapping[str, int]) -> Memory:
        """Estimates the memory of a step: as for a start state, plus the upscaled memory."""
        need = super().step_memory(rows, sizes)
        upscaled = self.abstract_params.upscaled
        held = sum(leaf.size * 4 for leaf in jax.tree.leaves(upscaled))
        memory = 4 * upscaled.memory.size
        config = self.model.config
        # The features per token of the layer that is being computed.
        features = 4 * config.num_heads * upscaled.features.mean.shape[-1]
        made = rows * self.own_length(sizes) * features * _FEATURE_COPIES
        return dataclasses.replace(
            need,
            parameters=need.parameters + held,
            moments=2 * memory,
            gradients=need.gradients + memory,
            activations=need.activations + made,
        )

    def make_params(self) -> RWKV7State:
        """Makes the start state with an empty memory, and calibrates features on the text."""
        settings = self.settings.upscaling
        features = resolve_features(
            settings.dynamics,
            kind=settings.kind,
            prepare=settings.prepare,
            widths=settings.widths,
            # With "dbp" the optimizer learns to whiten while tuning.
            whiten=self.settings.tuning.decorrelate == "whiten",
        )
        if sharding.is_abstract(self.frozen):
            upscaled = describe_upscaled(
                self.model.config,
                size=settings.size or 0,
                dynamics=settings.dynamics,
                kind=features.kind,
                prepare=features.prepare,
            )
        else:
            upscaled = upscale(
                self.model,
                self.frozen,
                self.data.calibration_text(settings.rows),
                size=settings.size or 0,
                dynamics=settings.dynamics,
                landmarks=settings.landmarks,
                kind=features.kind,
                prepare=features.prepare,
                widths=features.widths,
                seed=self.settings.seed,
            ).upscaled
        # The state of `upscale` has token shifts in the model's dtype, not in float32.
        return super().make_params().replace(upscaled=upscaled)
