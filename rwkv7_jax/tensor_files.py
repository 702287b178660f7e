"""Named tensors in files, whatever they mean: `.pth`, `.safetensors` and `.st`. Level 3."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from .names import Tensor
from .pth import read_pth
from .safetensors_file import read_safetensors

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
        # The ".4b" of a folder called "model-0.4b" is no suffix.
        if format == "orbax" and path.suffix[1:2].isalpha() and not path.is_dir():
            raise ValueError(
                f"checkpoint: `{path}` must end in .pth, .safetensors or .st, or be a folder."
            )
    if format not in FORMATS:
        raise ValueError(
            f"checkpoint: `format` must be one of {', '.join(FORMATS)}; got {format!r}."
        )
    return format


def read_named(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth, .safetensors or .st file by the names in it; wrappers are taken off.

    Raises:
        ValueError: not such a file, or not a flat dict of tensors.
    """
    found = read_pth(path) if path.suffix == ".pth" else read_safetensors(path)
    for wrapper in ("state_dict", "module", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    items = found.items() if isinstance(found, dict) else ()
    arrays = {n: x for n, x in items if isinstance(n, str) and isinstance(x, np.ndarray)}
    if not arrays:
        raise ValueError(f"checkpoint: `{path}` holds no tensors by name.")
    return {name: as_tensor(array) for name, array in arrays.items()}


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor of a file that is mapped into memory."""
    return Tensor(array.shape, array.dtype, lambda: array)


def forget(array: np.ndarray) -> None:
    """The pages that reading `array` brought in are given back, if it is a view of a mapped file.

    Otherwise they count as this process's memory beside the copy that was made of them.
    """
    owner: Any = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    if owner is not None and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)
