"""Checkpoints of a run: contents, verification and retention."""

from rwkv7_jax.runs.resume.checkpoint_store import CheckpointStore
from rwkv7_jax.runs.resume.checkpointer import Checkpointer
from rwkv7_jax.runs.resume.run_identity import Identity, identity_of

__all__ = [
    "CheckpointStore",
    "Checkpointer",
    "Identity",
    "identity_of",
]
