"""BASED, the baseline of the recall table: linear attention with Taylor features and small windows.

This package imports the model's arithmetic and checks. It knows no files, losses or training loops.

Source: Arora et al. 2024, "Simple linear attention language models balance the recall-throughput
tradeoff" (arXiv 2402.18668).
"""

from rwkv7_jax.based.config import LAYER_KINDS, BasedConfig
from rwkv7_jax.based.model import Based
from rwkv7_jax.based.state import (
    BasedState,
    StateBytes,
    check_based_state,
    init_based_state,
    state_bytes,
)
from rwkv7_jax.based.taylor import features, linear_attention, quadratic_attention

__all__ = [
    "LAYER_KINDS",
    "Based",
    "BasedConfig",
    "BasedState",
    "StateBytes",
    "check_based_state",
    "features",
    "init_based_state",
    "linear_attention",
    "quadratic_attention",
    "state_bytes",
]
