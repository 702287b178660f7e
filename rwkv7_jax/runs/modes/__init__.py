"""The training modes: what one run of train.py trains, and from which batches.

A mode is a subclass of `TrainingMode`; the loop in train.py knows nothing else of it.
"""

from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.registry import MODES, make_mode

__all__ = ["MODES", "TrainingMode", "make_mode"]
