"""Losses, the train step, and what a step costs.

A loss is a function of trainable parameters and a batch; a step is a pure function of a TrainState.
"""

from rwkv7_jax.training.costs import (
    Flops,
    Memory,
    flops_per_token,
    mfu,
    parameter_count,
    peak_flops,
    state_count,
    training_memory,
)
from rwkv7_jax.training.gradients import LossWithTotals
from rwkv7_jax.training.head_loss import (
    TermWeights,
    TokenStatistics,
    token_statistics,
    weighted_loss,
)
from rwkv7_jax.training.losses import (
    Loss,
    Metrics,
    loss_weights,
    next_token_loss,
    pretrain_loss,
)
from rwkv7_jax.training.projection_statistics import (
    layer_statistics,
    projections,
    weight_decorrelator,
)
from rwkv7_jax.training.token_chunks import map_token_chunks
from rwkv7_jax.training.train_step import (
    TrainState,
    TrainStep,
    make_eval_step,
    make_train_step,
)

__all__ = [
    "Flops",
    "Loss",
    "LossWithTotals",
    "Memory",
    "Metrics",
    "TermWeights",
    "TokenStatistics",
    "TrainState",
    "TrainStep",
    "flops_per_token",
    "layer_statistics",
    "loss_weights",
    "make_eval_step",
    "make_train_step",
    "map_token_chunks",
    "mfu",
    "next_token_loss",
    "parameter_count",
    "peak_flops",
    "pretrain_loss",
    "projections",
    "state_count",
    "token_statistics",
    "training_memory",
    "weight_decorrelator",
    "weighted_loss",
]
