"""Readers and writers of every checkpoint format; reads are safe, writes are atomic.

Only this package knows the tensor names inside a file. `model_files` handles models and
`state_files` handles start states; both are built from the other modules.
"""

from rwkv7_jax.checkpoints.integrity.finite_numbers import is_finite
from rwkv7_jax.checkpoints.integrity.verification import verify
from rwkv7_jax.checkpoints.model_files import (
    check_model_target,
    load_model,
    model_hash,
    save_model,
)
from rwkv7_jax.checkpoints.model_vocabulary import kept_vocabulary, model_tokenizer
from rwkv7_jax.checkpoints.orbax_import import import_orbax
from rwkv7_jax.checkpoints.param_tree import official_tensors
from rwkv7_jax.checkpoints.pth import read_pth, write_pth
from rwkv7_jax.checkpoints.state_files import (
    has_merged_state,
    load_logits,
    load_state,
    save_state,
)
from rwkv7_jax.checkpoints.state_sidecar import common_base_model, read_sidecar, sidecar
from rwkv7_jax.checkpoints.tensor_files import (
    read_metadata,
    read_safetensors,
    read_tensors,
    write_safetensors,
)
from rwkv7_jax.checkpoints.tensor_names import accepted_shapes, outer_shapes, shapes
from rwkv7_jax.checkpoints.unused_value_residual import without_unused_value_residual

__all__ = [
    "accepted_shapes",
    "check_model_target",
    "common_base_model",
    "has_merged_state",
    "import_orbax",
    "is_finite",
    "kept_vocabulary",
    "load_logits",
    "load_model",
    "load_state",
    "model_hash",
    "model_tokenizer",
    "official_tensors",
    "outer_shapes",
    "read_metadata",
    "read_pth",
    "read_safetensors",
    "read_sidecar",
    "read_tensors",
    "save_model",
    "save_state",
    "shapes",
    "sidecar",
    "verify",
    "without_unused_value_residual",
    "write_pth",
    "write_safetensors",
]
