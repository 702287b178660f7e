"""Named tensors in files, whatever they mean: `.pth`, `.safetensors` and `.st`."""

import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.checkpoints.pth import read_pth
from rwkv7_jax.checkpoints.tensor_names import Tensor

FORMATS = ("pth", "safetensors", "st", "hf", "orbax")

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


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


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, each read when it is wanted.

    Raises:
        ValueError: no safetensors file; the sentence has the path.
    """
    import safetensors

    try:
        file = safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: `{path}` is no safetensors file: {error}.") from None

    def tensor(name: str) -> Tensor:
        part = file.get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise ValueError(f"checkpoint: `{path}` has {name!r} of dtype {part.get_dtype()}.")
        shape, dtype = tuple(part.get_shape()), _DTYPES[part.get_dtype()]
        return Tensor(shape, dtype, lambda: file.get_tensor(name))

    return {name: tensor(name) for name in file.keys()}


def read_metadata(path: Path) -> dict[str, str]:
    """The words beside the tensors of a .safetensors file.

    Raises:
        ValueError: no safetensors file; the sentence has the path.
    """
    import safetensors

    try:
        return dict(safetensors.safe_open(path, framework="numpy").metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: `{path}` is no safetensors file: {error}.") from None


def read_named(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth, .safetensors or .st file by the names in it; wrappers are taken off.

    Raises:
        ValueError: not such a file, or not a flat dict of tensors.
    """
    if path.suffix != ".pth":
        tensors = read_safetensors(path)
    else:
        found = read_pth(path)
        for wrapper in ("state_dict", "module", "model"):
            if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
                found = found[wrapper]
        items = found.items() if isinstance(found, dict) else ()
        tensors = {
            name: Tensor(array.shape, array.dtype, lambda array=array: array)
            for name, array in items
            if isinstance(name, str) and isinstance(array, np.ndarray)
        }
    if not tensors:
        raise ValueError(f"checkpoint: `{path}` holds no tensors by name.")
    return tensors


def release_pages(array: np.ndarray) -> None:
    """The pages that reading `array` brought in are given back, if it is a view of a mapped file.

    Otherwise they count as this process's memory beside the copy that was made of them.
    """
    owner: Any = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    if owner is not None and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def write_safetensors(
    path: Path,
    items: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: dict[str, str] | None = None,
) -> None:
    """The arrays as a .safetensors file; whole or not at all.

    The package wants all arrays at once and copies them: this takes twice the file's size.

    Raises:
        ValueError: a dtype that the format does not have, or a folder that does not exist.
    """
    import safetensors.numpy

    arrays = {name: np.ascontiguousarray(array) for name, array in items}
    for name, array in arrays.items():
        if array.dtype not in _DTYPES.values():
            raise ValueError(f"write_safetensors: `{name}` has dtype {array.dtype}, unknown there.")
    with atomic_write(path) as file:
        file.write(safetensors.numpy.save(arrays, metadata=metadata))
