"""Checkpoints of a run: their contents, their verification, and which are kept."""

from rwkv7_jax.runs.resume.checkpoint_store import CheckpointStore, NullCheckpoints
from rwkv7_jax.runs.resume.checkpointer import Checkpoints
from rwkv7_jax.runs.resume.run_identity import Identity, identity_of

__all__ = [
    "CheckpointStore",
    "Checkpoints",
    "Identity",
    "NullCheckpoints",
    "identity_of",
]
