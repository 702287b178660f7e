"""The sizes and the dtype of a model's file, without reading its numbers."""

import functools
from pathlib import Path

import jax.numpy as jnp

from rwkv7_jax.checkpoints.integrity.named_errors import name_file
from rwkv7_jax.checkpoints.model_files import open_model
from rwkv7_jax.checkpoints.model_folder import existing_model
from rwkv7_jax.checkpoints.orbax_folder import describe_orbax, is_orbax
from rwkv7_jax.model.config import RWKV7Config


def describe_model(path: str | Path) -> tuple[RWKV7Config, str]:
    """Infers a checkpoint's config and the widest dtype of its tensors.

    Raises:
        ValueError: no such file, a damaged one, or not RWKV-7.
        ImportError: the package for a GGUF file is missing.
    """
    path = existing_model(path)
    with name_file(path, "load_model"):
        if is_orbax(path):
            return describe_orbax(path.absolute())
        tensors, config = open_model(path)
        dtypes = [tensor.dtype for tensor in tensors.values() if tensor.shape]
        return config, str(functools.reduce(jnp.promote_types, dtypes))
