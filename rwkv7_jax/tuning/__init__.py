"""The start state as trainable parameters: losses, masks, upscaled states, state arithmetic."""

from rwkv7_jax.tuning.calibration import (
    FeatureSettings,
    calibrate,
    resolve_features,
)
from rwkv7_jax.tuning.rate_factors import rate_factors, with_rate_factors
from rwkv7_jax.tuning.read_statistics import (
    initial_state_read_vectors,
    memory_read_vectors,
    second_moment,
    state_decorrelator,
    state_statistics,
)
from rwkv7_jax.tuning.state_arithmetic import (
    Capacity,
    capacity,
    scaled,
    singular_values,
    weighted_sum,
)
from rwkv7_jax.tuning.state_tuning import (
    LEAVES,
    StartStateLoss,
    check_leaves,
    hidden_states_from,
    state_loss,
    stop_gradient_except,
    trainable_mask,
)
from rwkv7_jax.tuning.upscaling import (
    empty_memory,
    fold_feature_map,
    stability_ratio,
    upscale,
)

__all__ = [
    "LEAVES",
    "Capacity",
    "FeatureSettings",
    "StartStateLoss",
    "calibrate",
    "capacity",
    "check_leaves",
    "empty_memory",
    "fold_feature_map",
    "hidden_states_from",
    "initial_state_read_vectors",
    "memory_read_vectors",
    "rate_factors",
    "resolve_features",
    "scaled",
    "second_moment",
    "singular_values",
    "stability_ratio",
    "state_decorrelator",
    "state_loss",
    "state_statistics",
    "stop_gradient_except",
    "trainable_mask",
    "upscale",
    "weighted_sum",
    "with_rate_factors",
]
