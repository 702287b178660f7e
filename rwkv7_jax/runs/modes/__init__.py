"""The training modes, which define what a run of train.py trains, and from which batches.

A mode is a subclass of `TrainingMode`, the only interface that the loop in train.py uses.
"""

from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.registry import MODES, make_mode

__all__ = ["MODES", "TrainingMode", "make_mode"]
