"""The modes that tune a start state or an upscaled state on text."""

import jax
import optax

from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.optim.decorrelation import decorrelate
from rwkv7_jax.runs.modes.base import DatasetMode, StateTuningMode
from rwkv7_jax.tuning.read_statistics import state_statistics
from rwkv7_jax.tuning.state_tuning import LEAVES, state_loss, trainable_mask
from rwkv7_jax.tuning.upscaling import upscale


class StateMode(DatasetMode, StateTuningMode):
    """Tunes a start state.

    Attributes:
        leaves: what is tuned, of `tuning.state_tuning.LEAVES`.
    """

    gradients_of = "state"

    leaves: tuple[str, ...]

    def set_up(self) -> None:
        """Loads the frozen model, opens the data and makes the loss."""
        settings = self.settings
        self.load_frozen_model()
        self.open_data()
        self.leaves = self.tuned_leaves()
        self._held_out = self.prediction_evaluator("held_out")
        self.loss = state_loss(
            self.model,
            self.frozen,
            leaves=self.leaves,
            anchor=settings.tuning.anchor,
            l2wrap=settings.optimizer.l2wrap,
        )
        if self._decorrelation_mode() is not None:
            self.statistics = state_statistics(
                self.model,
                self.frozen,
                leaves=self.leaves,
                rows=settings.decorrelation.rows,
            )

    def tuned_leaves(self) -> tuple[str, ...]:
        """Names the tuned leaves: the WKV state, and the token-shift states where asked for."""
        return LEAVES[:3] if self.settings.tuning.leaves == "all" else ("wkv",)

    def trained_count(self, trainables: RWKV7State) -> int:
        """Counts the numbers of the tuned leaves."""
        mask = trainable_mask(trainables, self.leaves)
        pairs = zip(jax.tree.leaves(trainables), jax.tree.leaves(mask), strict=True)
        return sum(leaf.size for leaf, tuned in pairs if tuned)

    def held_out_metrics(self, trainables: RWKV7State) -> dict[str, float]:
        """Measures how well the held-out rows are predicted from the tuned state."""
        return self._held_out(self.frozen, trainables)

    def wrap_optimizer(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """Lets the optimizer see the tuned leaves alone, decorrelated where that is asked for."""
        start = self.init_trainables()
        mask = trainable_mask(start, self.leaves)
        mode = self._decorrelation_mode()
        if mode is None:
            return optax.masked(tx, mask)
        decorrelation = self.settings.decorrelation
        # Token-shift states are vectors that nothing reads linearly over many tokens.
        matrices = tuple(leaf for leaf in self.leaves if leaf in ("wkv", "memory"))
        read = trainable_mask(start, matrices)
        if read.upscaled is not None:
            read = read.replace(upscaled=read.upscaled.replace(write=False))
        decorrelated = decorrelate(
            tx,
            mode=mode,
            mask=read,
            rate=decorrelation.rate,
            balance=decorrelation.balance,
            iterations=decorrelation.iterations,
            damping=decorrelation.damping,
            average=decorrelation.average,
        )
        return optax.masked(decorrelated, mask)

    def _decorrelation_mode(self) -> str | None:
        """Names the mode of `decorrelate`, or gives None where it is off."""
        decorrelate_by = self.settings.tuning.decorrelate
        if decorrelate_by == "dbp":
            return "online"
        # Features of a memory are whitened once, when it is made, and not by the optimizer.
        if decorrelate_by == "whiten" and "memory" not in self.leaves:
            return "whiten"
        return None


class UpscaledStateMode(StateMode):
    """Tunes a memory read through kernel features; the start state itself stays zero."""

    result_name = "state.safetensors"

    def set_up(self) -> None:
        """Loads the frozen model, opens the data and fits the features."""
        super().set_up()
        self._initial = self._fit_features()

    def tuned_leaves(self) -> tuple[str, ...]:
        """Names the memory, the only tuned leaf."""
        return ("memory",)

    def init_trainables(self) -> RWKV7State:
        """Gives a state of zeros with an empty memory."""
        return self._initial

    def _fit_features(self) -> RWKV7State:
        settings = self.settings.upscaling
        literal = settings.dynamics.startswith("replace")
        whiten = self.settings.tuning.decorrelate == "whiten" and not literal
        prepare = settings.prepare or ("whiten" if whiten else "none")
        widths = settings.widths
        if not widths:
            widths = (1.0,) if prepare == "none" else (1.0, 4.0, 16.0)
        upscaled = upscale(
            self.model,
            self.frozen,
            self.data.calibration_text(settings.rows),
            size=settings.size,
            dynamics=settings.dynamics,
            kind=settings.kind,
            landmarks=settings.landmarks,
            widths=widths,
            prepare=prepare,
            seed=self.settings.seed,
        ).upscaled
        return super().init_trainables().replace(upscaled=upscaled)
