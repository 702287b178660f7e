"""Comparison of files with the checksums and digests in them."""

from pathlib import Path

from rwkv7_jax.checkpoints.integrity.named_errors import name_file
from rwkv7_jax.checkpoints.model_files import load_model
from rwkv7_jax.checkpoints.orbax_folder import has_orbax_digest, load_orbax
from rwkv7_jax.checkpoints.pth import has_digest, read_pth
from rwkv7_jax.checkpoints.state_files import SUFFIXES, load_state
from rwkv7_jax.checkpoints.state_sidecar import has_state_digest, sidecar
from rwkv7_jax.checkpoints.tensor_files import (
    format_of,
    has_safetensors_digest,
    read_safetensors,
)
from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.local_paths import existing_path


def verify(path: str | Path) -> list[str]:
    """Compares a model, a state or an observer with every checksum and digest that it carries.

    Reads all bytes. Files of other programs carry nothing but a `.pth` file's CRC-32 sums.

    Args:
        path: of a file or a folder.

    Returns:
        What was compared, a sentence for each file; empty where there is nothing to compare with.

    Raises:
        ValueError: a file does not agree, or cannot be read; the message names it.
    """
    with prefix_errors("verify"):
        path = existing_path(path, "`path`")
    with name_file(path, "verify"):
        if path.is_file():
            return _verify_file(path)
        return _verify_folder(path)


def _verify_file(path: Path) -> list[str]:
    """Compares one file, and a state with its sidecar."""
    found = []
    if path.suffix == ".pth":
        read_pth(path, verify=True)
        found.append(f"{path.name}: the CRC-32 of every entry agrees")
        if has_digest(path):
            found.append(f"{path.name}: the digest of the tensors agrees")
    else:
        # Refuses names that end otherwise.
        format_of(path)
        read_safetensors(path, verify=True)
        if has_safetensors_digest(path):
            found.append(f"{path.name}: the digest of tensors and metadata agrees")
    if path.suffix in SUFFIXES and has_state_digest(path):
        load_state(path)
        found.append(f"{sidecar(path).name}: belongs to these tensors")
    return found


def _verify_folder(folder: Path) -> list[str]:
    """Compares the files of a model's or an observer's folder."""
    weights = sorted(folder.glob("*.safetensors"))
    if format_of(folder) == "orbax" and not weights:
        load_orbax(folder.absolute(), allow_nan=True, verify=True)
        return (
            ["params: the digest of the arrays agrees"]
            if has_orbax_digest(folder)
            else []
        )
    found = []
    for file in weights:
        found += _verify_file(file)
    # An HF folder's config.json must agree with the weights too.
    if format_of(folder) == "hf":
        load_model(folder, allow_nan=True)
    return found
