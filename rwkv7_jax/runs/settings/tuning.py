"""The settings of the modes that tune a state."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from rwkv7_jax.model.kernel_features import FEATURE_MAPS
from rwkv7_jax.model.upscaled_memory import MEMORY_FORMS
from rwkv7_jax.optim.decorrelation import Method as DecorrelationMethod
from rwkv7_jax.runs.settings.fields import (
    MOST_COUNT,
    MOST_RATE,
    MOST_WEIGHT,
    Range,
    choice,
    choose,
    number,
    optional,
    place,
    shown,
)
from rwkv7_jax.tuning.calibration import LANDMARKS, PREPARATIONS
from rwkv7_jax.tuning.rate_search import RATES
from rwkv7_jax.tuning.state_tuning import LEAVES


@dataclasses.dataclass(frozen=True)
class TuningSettings:
    """The settings of the modes that tune a state.

    Attributes:
        leaves: "wkv", or "all" to tune the token-shift states too. For an upscaled state, the
            memory is tuned instead.
        decorrelate: "none", "dbp" (decorrelated backpropagation, learnt while tuning) or "whiten"
            (once: for features on the calibration text, for a start state at the first step).
        anchor: weight of KL(base || tuned) on the unlabelled text of `anchor_path`; 0 turns it off.
        anchor_path: general text, or a task, on which the tuned model should stay close to the
            base.
        alpha: factor on the saved state. A factor below 1 keeps most of the gain and forgets less.
        warn_above: a larger magnitude in the state causes a warning.
        rates: learning rates to search before the run if `optimizer.learning_rate` is not set. Each
            is tried in a short run, all in one program; the loss on held-out text decides.
        search_share: cost of the search, as a fraction of the run's FLOPs.
        states: texts by the names of their states, such as {"poet": "poems.jsonl"}, or a folder of
            texts. The run tunes one start state for each, in place of `data.path`.
        leaf_rates: factors on the learning rate by tuned leaf ("wkv", "att_shift", "ffn_shift",
            "memory"), such as {"att_shift": 0.1}; 1 for other leaves.
        layer_rates: factors on the learning rate, one per layer; all 1 by default.
    """

    leaves: Literal["wkv", "all"] = "wkv"
    decorrelate: DecorrelationMethod = "none"
    anchor: float = number(0.0, 0, MOST_WEIGHT)
    anchor_path: str | None = place(None, several=True)
    alpha: float = number(1.0, 0, MOST_RATE)
    warn_above: float = number(50.0, 0, 1e30)
    rates: tuple[float, ...] = number(RATES, 0, MOST_RATE, above=True)
    search_share: float = number(0.1, 0, 1, above=True)
    states: str | Mapping[str, str] | None = optional()
    leaf_rates: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layer_rates: tuple[float, ...] = number((), 0, MOST_RATE)

    def __post_init__(self):
        """Checks the rates and the factors; the mode checks that the leaves are tuned.

        Raises:
            ValueError: two rates are equal, a leaf is unknown, or a factor is out of range.
        """
        # Records of a search name a rate by six digits.
        names = [f"{rate:g}" for rate in self.rates]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    "`config.tuning.rates` must differ in their first six digits; got "
                    f"{name} more than once."
                )
        for name, factor in self.leaf_rates.items():
            choose("config.tuning.leaf_rates", LEAVES, name)
            where = f"config.tuning.leaf_rates.{name}"
            if isinstance(factor, bool) or not isinstance(factor, int | float):
                raise ValueError(f"`{where}` must be a number; got {shown(factor)}.")
            Range(0, MOST_RATE).check(factor, where)


@dataclasses.dataclass(frozen=True)
class UpscalingSettings:
    """The settings of mode "upscaled_state"; see `tuning.upscaling.upscale`.

    Attributes:
        size: features per head (M); by default four times the head size.
        dynamics: "static", "decay", "delta"; "replace" and "replace_raw" are the paper's form; or a
            form that a module of `config.imports` adds.
        kind: "gaussian" (by default), "fourier" or "gaussian_raw"; or a map that a module of
            `config.imports` adds.
        landmarks: "random" or "kmeans".
        widths: factors on 1 / the median squared distance; by default 1, 4 and 16 for whitened
            features and otherwise 1.
        prepare: "none", "centre" or "whiten"; the default depends on `tuning.decorrelate`.
        rows: rows of the training text for the calibration of features.
    """

    size: int | None = number(None, 0, MOST_COUNT, absent=0)
    dynamics: str = choice("static", MEMORY_FORMS)
    kind: str | None = choice(None, FEATURE_MAPS, absent="")
    landmarks: str = choice("random", LANDMARKS)
    widths: tuple[float, ...] | None = number(
        None, 0, MOST_WEIGHT, above=True, absent=()
    )
    prepare: str | None = choice(None, PREPARATIONS, absent="")
    rows: int = number(48, 1, MOST_COUNT)


@dataclasses.dataclass(frozen=True)
class DecorrelationSettings:
    """Numbers of `tuning.decorrelate` and `optimizer.decorrelate`; see `optim.decorrelation`.

    The rule as published is iterations=1, damping=0, average=0, clip=None, normalise=False.

    Attributes:
        rate: step of the online rule.
        balance: between decorrelation (0) and unit variances (1).
        iterations: steps of the rule per update.
        damping: added to the covariance, in units of its mean eigenvalue.
        average: weight of the old covariance in its running average.
        clip: largest norm of the online rule's relative step; None for no limit.
        normalise: whiten the covariance in units of its mean, which keeps learning rates
            comparable.
        rows: rows of a batch for the statistics.
    """

    rate: float = number(0.2, 0, MOST_RATE)
    balance: float = number(0.5, 0, 1)
    iterations: int = number(12, 0, MOST_COUNT)
    damping: float = number(1e-4, 0, MOST_RATE)
    average: float = number(0.7, 0, 1, below=True)
    clip: float | None = number(
        0.5, 0, MOST_WEIGHT, above=True, note=", or None for no limit"
    )
    normalise: bool = True
    rows: int = number(4, 1, MOST_COUNT)
