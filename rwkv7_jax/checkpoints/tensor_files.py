"""Files of named tensors: PyTorch, safetensors, rwkv.cpp and GGUF.

A reader detects the format from a file's first bytes; a writer takes it from the suffix.
"""

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal, NamedTuple, cast, get_args

import ml_dtypes
import numpy as np
import safetensors

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.checkpoints.integrity import file_signatures
from rwkv7_jax.checkpoints.integrity.digests import ContentDigest, digest_of_arrays
from rwkv7_jax.checkpoints.integrity.file_signatures import Container
from rwkv7_jax.checkpoints.layouts.orientation import LowRank
from rwkv7_jax.checkpoints.mapped_files import map_file, release_pages
from rwkv7_jax.checkpoints.pth import (
    StorageSums,
    inner_dicts,
    open_pth,
    read_pth_metadata,
)
from rwkv7_jax.checkpoints.restricted_unpickler import UnreadTensor
from rwkv7_jax.checkpoints.rwkv_cpp_files import read_rwkv_cpp
from rwkv7_jax.checkpoints.tensor_names import Tensor
from rwkv7_jax.checks import check_choice, first_line, prefix_errors

Format = Literal["pth", "safetensors", "st", "gguf", "hf", "transformers", "orbax"]

FORMATS: tuple[Format, ...] = get_args(Format)

# The single-file formats, named after their suffixes.
_FILE_FORMATS: tuple[Format, ...] = ("pth", "safetensors", "st", "gguf")

# Metadata key: the digest of the tensors and of the other metadata.
_DIGEST_KEY = "rwkv7_jax.digest"

# Metadata key: the orientation of the low-rank matrices, which the shapes may not determine.
LOW_RANK_KEY = "rwkv7_jax.low_rank"

# Metadata key: the epsilon of the model's layer norms.
NORM_EPS_KEY = "rwkv7_jax.norm_eps"

# The metadata keys of all epsilons, and the fields of the config that they hold.
EPSILONS = {
    NORM_EPS_KEY: "norm_eps",
    "rwkv7_jax.group_norm_eps": "group_norm_eps",
}

# Metadata key of HF folders: a vocabulary of plain ids, which has no file.
VOCABULARY_KEY = "rwkv7_jax.vocabulary"

# The assumed format of a file whose first bytes are damaged.
_CONTAINER_BY_SUFFIX: dict[str, Container] = {
    ".pth": "pth",
    ".safetensors": "safetensors",
    ".st": "safetensors",
    ".gguf": "gguf",
}

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

_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# Bytes of the header's length, with which a .safetensors file begins.
_LENGTH_BYTES = 8


class TensorFile(NamedTuple):
    """The tensors of a file or folder.

    Attributes:
        tensors: tensors under the names in the file.
        low_rank: orientation of a model's low-rank matrices, if the format determines it.
        norm_eps: epsilon of a model's layer norms, if the file has it.
        group_norm_eps: epsilon of its per-head norm, if the file has it.
    """

    tensors: dict[str, Tensor]
    low_rank: LowRank | None = None
    norm_eps: float | None = None
    group_norm_eps: float | None = None


def format_of(path: str | Path, *, format: str | None = None) -> Format:
    """Determines the format to write at a path from its suffix or the existing folder.

    Args:
        path: path of the checkpoint; need not exist.
        format: name of a format, which takes precedence over the path.

    Raises:
        ValueError: the name or the suffix is unknown.
    """
    if format is not None:
        check_choice(format, FORMATS, "`format`")
        return cast(Format, format)
    path = Path(path)
    # Checked before the suffix, because an HF folder's name may end in anything.
    if (path / "config.json").exists():
        return "hf"
    for known in _FILE_FORMATS:
        if path.suffix == f".{known}":
            return known
    # The ".4b" of a folder called "model-0.4b" is not a suffix.
    has_suffix = path.suffix[1:2].isalpha()
    if path.is_file() or (has_suffix and not path.is_dir()):
        raise ValueError(
            f"`{path}` must end in .pth, .safetensors, .st or .gguf, or be a folder."
        )
    return "orbax"


def _open_header(path: Path) -> Any:
    """Opens a file and checks its header; reads no tensor."""
    if not path.is_file():
        raise ValueError(f"`{path}` is not a file.")
    sentence = file_signatures.describe_other_file(path)
    if sentence is None and file_signatures.container_of(path) == "pth":
        sentence = "is a zip archive, as PyTorch's files are: rename it to .pth"
    if sentence is not None:
        raise ValueError(f"`{path}` {sentence}.")
    try:
        return safetensors.safe_open(path, framework="numpy")
    # For some headers the package raises other errors than its own.
    except Exception as error:
        sentence = file_signatures.describe_cut_safetensors(path)
        if sentence is None:
            sentence = f"is not a safetensors file: {first_line(error)}"
        raise ValueError(f"`{path}` {sentence}.") from None


@prefix_errors("read_safetensors")
def read_safetensors(path: Path, *, verify: bool = False) -> dict[str, Tensor]:
    """Opens a .safetensors file, whose tensors are views of the mapped file.

    Args:
        path: path of the file.
        verify: check the tensors and metadata against the file's digest, if it has one. Reads the
            whole file.

    Raises:
        ValueError: the file is not safetensors or is damaged; the message has the path.
    """
    opened = _open_header(path)
    tensors = {}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        # The package has checked that this is JSON and that all tensors are inside the file.
        header = json.loads(file.read(size))
    mapped = map_file(path)
    for name in opened.keys():
        entry = header[name]
        if entry["dtype"] not in _DTYPES:
            raise _unread(path, name, entry["dtype"])
        start = _LENGTH_BYTES + size + entry["data_offsets"][0]
        shape = tuple(entry["shape"])
        tensors[name] = Tensor.mapped(mapped, shape, _DTYPES[entry["dtype"]], start)
    if verify:
        _check_digest(path, tensors, dict(opened.metadata() or {}))
        release_pages(mapped)
    return tensors


def _check_digest(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Raises unless a file's tensors and metadata match the digest in it."""
    expected = metadata.pop(_DIGEST_KEY, None)
    if expected is None:
        return
    arrays = ((name, tensor.read()) for name, tensor in tensors.items())
    if digest_of_arrays(arrays, metadata) != expected:
        raise ValueError(
            f"`{path}` is damaged: its tensors or metadata are not those that were "
            "written (their digest differs); download or copy it again."
        )


def has_safetensors_digest(path: Path) -> bool:
    """Returns whether a .safetensors file holds a digest of its content."""
    return _DIGEST_KEY in (_open_header(path).metadata() or {})


@prefix_errors("read_metadata")
def read_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata of a .safetensors file, without the digest.

    Raises:
        ValueError: the file is not safetensors; the message has the path.
    """
    metadata = dict(_open_header(path).metadata() or {})
    metadata.pop(_DIGEST_KEY, None)
    return metadata


def open_tensors(path: Path, *, verify: bool = False) -> TensorFile:
    """Opens a PyTorch, safetensors, rwkv.cpp or GGUF file, whatever its name.

    Dicts that trainers wrap around the tensors are removed.

    Args:
        path: path of the file.
        verify: check the tensors against the checksums and the digest in the file.

    Raises:
        ValueError: the format is unknown, or the file holds no flat dict of tensors.
    """
    if not path.is_file():
        raise ValueError(f"`{path}` is not a file.")
    # A new format also needs its first bytes in `file_signatures`.
    match container_of(path):
        case "pth":
            content, sums = open_pth(path, verify=verify)
            tensors = named_arrays(content, path, sums)
            opened = TensorFile(
                tensors, "official", *_epsilons(read_pth_metadata(path))
            )
        case "safetensors":
            opened = _open_safetensors(path, verify)
        case "rwkv.cpp":
            # The format has no checksum.
            opened = TensorFile(read_rwkv_cpp(path), "transposed")
        case "gguf":
            opened = gguf_files().read_gguf(path, verify=verify)
    if not opened.tensors:
        raise ValueError(f"`{path}` holds no tensors by name.")
    return opened


def container_of(path: Path) -> Container:
    """Determines the format of a tensor file from its first bytes, or else from its suffix.

    Raises:
        ValueError: neither determines it; the message says what the file is instead.
    """
    container = file_signatures.container_of(path)
    if container is None:
        container = _CONTAINER_BY_SUFFIX.get(path.suffix)
    if container is not None:
        return container
    sentence = file_signatures.describe_other_file(path, also_text=False)
    if sentence is None:
        sentence = (
            "is not a checkpoint: it begins neither like a file of PyTorch (.pth, .bin, .state), "
            "nor of safetensors (.safetensors, .st), nor of rwkv.cpp (.bin), nor of "
            "llama.cpp (.gguf)"
        )
    raise ValueError(f"`{path}` {sentence}.")


def _open_safetensors(path: Path, verify: bool) -> TensorFile:
    tensors = read_safetensors(path, verify=verify)
    metadata = dict(_open_header(path).metadata() or {})
    said = metadata.get(LOW_RANK_KEY)
    # Our own early files lack this entry; their suffix determines the orientation.
    if said is None and _DIGEST_KEY in metadata:
        said = "transposed" if path.suffix == ".st" else "official"
    low_rank = cast(LowRank, said) if said in get_args(LowRank) else None
    return TensorFile(tensors, low_rank, *_epsilons(metadata))


def _epsilons(metadata: Mapping[str, str]) -> Iterator[float | None]:
    """Yields the epsilons in a file's metadata, as in `TensorFile`."""
    for key in EPSILONS:
        value = metadata.get(key)
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"`{key}` in the metadata must be a number; got {value!r:.40}"
            ) from None
        yield number


def gguf_files() -> ModuleType:
    """Imports the module that needs the package `gguf`.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        return importlib.import_module("rwkv7_jax.checkpoints.gguf_files")
    except ImportError:
        raise ImportError(
            "a .gguf file needs the package gguf: pip install 'rwkv7_jax[gguf]'."
        ) from None


# Trainers store a model's tensors under these names, next to things that are not the model's.
_WRAPPERS = ("state_dict", "model_state_dict", "module", "model")


@prefix_errors("read_tensors")
def read_tensors(path: Path, *, verify: bool = False) -> dict[str, Tensor]:
    """Opens a file like `open_tensors` and returns only its tensors, under the names in it.

    Args:
        path: path of the file.
        verify: check the tensors against the checksums and the digest in the file.

    Raises:
        ValueError: the format is unknown, or the file holds no flat dict of tensors.
    """
    return open_tensors(path, verify=verify).tensors


def _only_holder(content: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """Returns the only inner dict that holds tensors, whatever its name, or else the dict itself.

    Raises:
        ValueError: several inner dicts hold tensors.
    """
    if _holds_tensors(content):
        return content
    holding = {id(inner) for inner in inner_dicts(content) if _holds_tensors(inner)}
    holders = [name for name, value in content.items() if id(value) in holding]
    if len(holders) > 1:
        first = repr(holders[0])
        second = repr(holders[1])
        raise ValueError(
            f"`{path}` holds tensors under {first} and under {second}, and neither name "
            "tells which are the model's: load it with PyTorch and save only one of them."
        )
    return content[holders[0]] if holders else content


def _holds_tensors(table: dict[Any, Any]) -> bool:
    """Returns whether a dict holds tensors; scalars may be losses or step counts."""
    arrays = [entry for entry in table.values() if isinstance(entry, np.ndarray)]
    is_read = any(array.ndim for array in arrays)
    return is_read or any(isinstance(entry, UnreadTensor) for entry in table.values())


def named_arrays(content: Any, path: Path, sums: StorageSums) -> dict[str, Tensor]:
    """Extracts the named tensors from the content of a .pth file and drops everything else.

    Args:
        content: the unpickled content of the file.
        path: path of the file, for error messages.
        sums: checksums of the file, checked when a whole tensor is read.

    Raises:
        ValueError: several dicts hold tensors, or a tensor has an unsupported dtype.
    """
    # In this order, because each may contain the next.
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {}
    if isinstance(content, dict):
        for name, value in _only_holder(content, path).items():
            if isinstance(name, str) and isinstance(value, UnreadTensor):
                raise _unread(path, name, value.kind)
            if isinstance(name, str) and isinstance(value, np.ndarray):
                tensors[name] = _compared_tensor(name, value, sums)
    return tensors


def _compared_tensor(name: str, array: np.ndarray, sums: StorageSums) -> Tensor:
    """Builds a tensor whose checksum is checked when all of it is read."""

    def read() -> np.ndarray:
        sums.check(name, array)
        return array

    # A process that needs only a part must not read the whole tensor for its checksum.
    return Tensor(array.shape, array.dtype, read, lambda index: array[index])


def _unread(path: Path, name: str, kind: str) -> ValueError:
    """Builds the error for a tensor of an unsupported dtype."""
    *others, last = map(str, _DTYPE_NAMES)
    return ValueError(
        f"`{path}` has {name!r} of dtype {kind}; save it in one of the supported dtypes, "
        f"{', '.join(others)} or {last}."
    )


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a .safetensors file atomically.

    Args:
        path: path of the file.
        tensors: names and arrays.
        metadata: strings for the header.

    Raises:
        ValueError: the format lacks a dtype, or the folder does not exist.
    """
    with atomic_write(path) as file:
        dump_safetensors(file, tensors, metadata=metadata)


def dump_safetensors(
    file: BinaryIO,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes the bytes of a .safetensors file into an open file, with a digest in its metadata.

    Raises:
        ValueError: the format lacks a dtype.
    """
    arrays = {}
    for name, array in tensors:
        if array.dtype not in _DTYPE_NAMES:
            raise ValueError(
                f"write_safetensors: `{name}` must have a dtype of the format; got {array.dtype}."
            )
        arrays[name] = array
    # Wide dtypes first, as in the package, so that every tensor is aligned.
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    arrays = {name: arrays[name] for name in names}
    start = file.tell()
    # Each array is read once, since it may be mapped from a file that is larger than memory.
    digest = ContentDigest()
    # The digest is known only after all tensors; a placeholder reserves its space.
    placeholder = digest.hexdigest()
    file.write(_safetensors_header(arrays, metadata or {}, placeholder))
    for name, array in arrays.items():
        # `ascontiguousarray` turns a scalar into a vector, so the shape is restored.
        contiguous = np.ascontiguousarray(array).reshape(array.shape)
        file.write(contiguous.reshape(-1).view(np.uint8).data)
        digest.add(name, contiguous)
    final = digest.hexdigest(dict(metadata or {}))
    end = file.tell()
    file.seek(start)
    file.write(_safetensors_header(arrays, metadata or {}, final))
    file.seek(end)


def _safetensors_header(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], digest: str
) -> bytes:
    """Returns the start of a file: the header's length and the header.

    Source: huggingface/safetensors README.md, "Format".
    """
    table: dict[str, Any] = {"__metadata__": {**metadata, _DIGEST_KEY: digest}}
    end = 0
    for name, array in arrays.items():
        begin = end
        end += array.nbytes
        table[name] = {
            "dtype": _DTYPE_NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    # Spaces after the JSON align the first tensor to a multiple of 8 bytes.
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
