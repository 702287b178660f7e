"""Verification of files against the checksums and digests in them."""

from pathlib import Path

from rwkv7_jax.checkpoints.huggingface import files_of_weights
from rwkv7_jax.checkpoints.integrity.named_errors import name_file
from rwkv7_jax.checkpoints.model_files import load_model
from rwkv7_jax.checkpoints.model_folder import existing_model
from rwkv7_jax.checkpoints.orbax_folder import has_orbax_digest, is_orbax, load_orbax
from rwkv7_jax.checkpoints.pth import has_digest, read_pth
from rwkv7_jax.checkpoints.state_files import load_state
from rwkv7_jax.checkpoints.state_sidecar import DIGEST, read_table, sidecar
from rwkv7_jax.checkpoints.tensor_files import (
    container_of,
    format_of,
    gguf_files,
    has_safetensors_digest,
    open_tensors,
    read_safetensors,
)
from rwkv7_jax.checks import prefix_errors


def verify(path: str | Path) -> list[str]:
    """Verifies a model, a state or an observer against every checksum and digest that it carries.

    Reads all bytes. Of other programs' files, only `.pth` files carry checksums, their CRC-32.

    Args:
        path: path of a file or folder.

    Returns:
        One sentence for each successful check; empty if the files carry nothing to check.

    Raises:
        ValueError: a file fails its check or cannot be read; the message names it.
    """
    with prefix_errors("verify"):
        path = existing_model(path)
    with name_file(path, "verify"):
        if path.is_file():
            return _verify_file(path)
        return _verify_folder(path)


def _verify_file(path: Path) -> list[str]:
    """Verifies one file, and a state against its sidecar."""
    lines = []
    container = container_of(path)
    if container == "pth":
        read_pth(path, verify=True)
        lines.append(f"{path.name}: the CRC-32 of every entry agrees")
        if has_digest(path):
            lines.append(f"{path.name}: the digest of the tensors agrees")
    elif container == "safetensors":
        read_safetensors(path, verify=True)
        if has_safetensors_digest(path):
            lines.append(f"{path.name}: the digest of tensors and metadata agrees")
    else:
        open_tensors(path, verify=True)
        if container == "gguf" and gguf_files().has_gguf_digest(path):
            lines.append(f"{path.name}: the digest of tensors and sizes agrees")
    if DIGEST in read_table(path):
        load_state(path)
        lines.append(f"{sidecar(path).name}: belongs to these tensors")
    return lines


def _verify_folder(folder: Path) -> list[str]:
    """Verifies the files of a model's or an observer's folder."""
    if is_orbax(folder):
        load_orbax(folder.absolute(), allow_nan=True, verify=True)
        return (
            ["params: the digest of the arrays agrees"]
            if has_orbax_digest(folder)
            else []
        )
    lines = []
    for file in files_of_weights(folder):
        lines += _verify_file(file)
    # A folder's config.json must also agree with the weights; an observer's folder has none.
    if not lines or format_of(folder) == "hf":
        load_model(folder, allow_nan=True)
    return lines
