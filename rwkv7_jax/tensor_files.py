"""Named tensors in files, whatever they mean: `.pth`, `.safetensors` and `.st`. Level 3."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

from .names import Tensor
from .pth import read_pth

FORMATS = ("pth", "safetensors", "st", "hf", "orbax")


def format_of(path: str | Path, *, format: str | None = None) -> str:
    """The format that a path means: by suffix, or by what a folder holds.

    Raises:
        ValueError: an unknown name or suffix.
    """
    path = Path(path)
    if format is None:
        if (path / "config.json").exists():
            return "hf"
        format = path.suffix[1:] if path.suffix in (".pth", ".safetensors", ".st") else "orbax"
        if format == "orbax" and path.suffix and not path.is_dir():
            raise ValueError(
                f"checkpoint: `{path}` must end in .pth, .safetensors or .st, or be a folder."
            )
    if format not in FORMATS:
        raise ValueError(
            f"checkpoint: `format` must be one of {', '.join(FORMATS)}; got {format!r}."
        )
    return format


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, each read when it is wanted.

    Raises:
        ValueError: no safetensors file; the sentence has the path.
    """
    import safetensors

    try:
        file = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"checkpoint: `{path}` is no safetensors file: {error}.") from None

    def tensor(name):
        part = file.get_slice(name)
        return Tensor(
            tuple(part.get_shape()), _DTYPES[part.get_dtype()], lambda: file.get_tensor(name)
        )

    try:
        return {name: tensor(name) for name in file.keys()}
    except KeyError as error:
        raise ValueError(f"checkpoint: `{path}` has a tensor of dtype {error}.") from None


_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def read_named(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth, .safetensors or .st file by the names in it; wrappers are taken off.

    Raises:
        ValueError: not such a file, or not a flat dict of tensors.
    """
    if path.suffix != ".pth":
        return read_safetensors(path)
    found = read_pth(path)
    for wrapper in ("state_dict", "module", "model"):
        if isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    tensors = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    if not tensors:
        raise ValueError(f"checkpoint: `{path}` holds no tensors.")
    return {
        name: Tensor(array.shape, array.dtype, lambda array=array: array)
        for name, array in tensors.items()
    }


def write_safetensors(
    path: Path,
    items: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: dict[str, str] | None = None,
) -> None:
    """The arrays as a .safetensors file; whole or not at all."""
    import safetensors.numpy

    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        arrays = {name: np.ascontiguousarray(array) for name, array in items}
        safetensors.numpy.save_file(arrays, partial, metadata=metadata)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
