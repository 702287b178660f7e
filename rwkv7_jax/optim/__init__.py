"""Optax transformations. They know trees and paths; of RWKV, only its parameter groups.

Import the function `whitening` from `rwkv7_jax.optim.whitening`: as an attribute of this package it
would shadow the module.
"""

from rwkv7_jax.optim.decorrelation import DecorrelationState, Decorrelator, decorrelate
from rwkv7_jax.optim.optimizer import (
    build_optimizer,
    group,
    group_labels,
    group_table,
    learning_rate_schedule,
    scale_by_factors,
)
from rwkv7_jax.optim.whitening import effective_rank
from rwkv7_jax.sharding.layout import path_name

__all__ = [
    "DecorrelationState",
    "Decorrelator",
    "build_optimizer",
    "decorrelate",
    "effective_rank",
    "group",
    "group_labels",
    "group_table",
    "learning_rate_schedule",
    "path_name",
    "scale_by_factors",
]
