"""Named tensors in files, whatever they mean: PyTorch's, safetensors, rwkv.cpp's and llama.cpp's.

A file that is read is known by its first bytes, one that is written by its suffix.
"""

import importlib
import json
from collections.abc import Iterable, Mapping
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
from rwkv7_jax.checkpoints.pth import StorageSums, inner_dicts, open_pth
from rwkv7_jax.checkpoints.restricted_unpickler import UnreadTensor
from rwkv7_jax.checkpoints.rwkv_cpp_files import read_rwkv_cpp
from rwkv7_jax.checkpoints.tensor_names import Tensor
from rwkv7_jax.checks import check_choice, first_line, prefix_errors

Format = Literal["pth", "safetensors", "st", "gguf", "hf", "transformers", "orbax"]

FORMATS: tuple[Format, ...] = get_args(Format)

# The formats of single files; each is called like its suffix.
_FILE_FORMATS: tuple[Format, ...] = ("pth", "safetensors", "st", "gguf")

# The metadata's entry with the digest of the tensors and of the other metadata.
_DIGEST_KEY = "rwkv7_jax.digest"

# The metadata's entry that says how a model's low-rank matrices lie, which shapes may not tell.
LOW_RANK_KEY = "rwkv7_jax.low_rank"

# The metadata's entry with the epsilon that a model's weights were saved with.
NORM_EPS_KEY = "rwkv7_jax.norm_eps"

# The metadata's entry of an HF folder whose vocabulary has no file: that of ids that are no text.
VOCABULARY_KEY = "rwkv7_jax.vocabulary"

# What a file is taken for whose first bytes are damaged.
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

# Bytes of the number that a .safetensors file begins with: the length of its header.
_LENGTH_BYTES = 8


class TensorFile(NamedTuple):
    """The tensors of a file or folder.

    Attributes:
        tensors: by the names in the file.
        low_rank: how a model's low-rank matrices lie, where the format says so.
        norm_eps: epsilon of a model's layer norms, where the file says it.
    """

    tensors: dict[str, Tensor]
    low_rank: LowRank | None = None
    norm_eps: float | None = None


def format_of(path: str | Path, *, format: str | None = None) -> Format:
    """Tells the format to write at a path by its suffix, or by what the folder there holds.

    Args:
        path: need not exist.
        format: a name that takes precedence over the path.

    Raises:
        ValueError: an unknown name or suffix.
    """
    if format is not None:
        check_choice(format, FORMATS, "`format`")
        return cast(Format, format)
    path = Path(path)
    # Before the suffix: the name of an HF folder may end in anything.
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
    """Opens a file; its header is checked, and no tensor is read."""
    if not path.is_file():
        raise ValueError(f"`{path}` is not a file.")
    sentence = file_signatures.describe_other_file(path)
    if sentence is None and file_signatures.is_zip(file_signatures.read_head(path)):
        sentence = "is a zip archive, as PyTorch's files are: rename it to .pth"
    if sentence is not None:
        raise ValueError(f"`{path}` {sentence}.")
    try:
        return safetensors.safe_open(path, framework="numpy")
    # The package raises errors of other kinds for some headers.
    except Exception as error:
        sentence = file_signatures.describe_cut_safetensors(path)
        if sentence is None:
            sentence = f"is not a safetensors file: {first_line(error)}"
        raise ValueError(f"`{path}` {sentence}.") from None


@prefix_errors("read_safetensors")
def read_safetensors(path: Path, *, verify: bool = False) -> dict[str, Tensor]:
    """Opens a .safetensors file, whose tensors are views of the mapped file.

    Args:
        path: of the file.
        verify: compare the tensors and the metadata with the file's digest, where it has one; this
            reads the complete file.

    Raises:
        ValueError: not a safetensors file, or a damaged one; the message has the path.
    """
    opened = _open_header(path)
    tensors = {}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        # The package has checked that this is JSON, and that all tensors lie inside the file.
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
    """Raises unless a file's tensors and metadata have the digest that the file gives."""
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
    """Reads the strings that a .safetensors file holds besides its tensors and their digest.

    Raises:
        ValueError: not a safetensors file; the message has the path.
    """
    metadata = dict(_open_header(path).metadata() or {})
    metadata.pop(_DIGEST_KEY, None)
    return metadata


def open_tensors(path: Path, *, verify: bool = False) -> TensorFile:
    """Opens a file of PyTorch's, safetensors, of rwkv.cpp or llama.cpp, whatever its name.

    Dicts that trainers wrap around the tensors are taken off.

    Args:
        path: of the file.
        verify: compare the tensors with the checksums and the digest in the file.

    Raises:
        ValueError: not such a file, or no flat dict of tensors in it.
    """
    if not path.is_file():
        raise ValueError(f"`{path}` is not a file.")
    # A further kind of file needs its first bytes in `file_signatures`, too.
    match container_of(path):
        case "pth":
            content, sums = open_pth(path, verify=verify)
            opened = TensorFile(named_arrays(content, path, sums), "official")
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
    """Tells which kind of tensor file this is by its first bytes, and by its suffix if they fail.

    Raises:
        ValueError: neither says so; the message says what the file is instead.
    """
    container = file_signatures.container_of(path)
    if container is None:
        container = _CONTAINER_BY_SUFFIX.get(path.suffix)
    if container is not None:
        return container
    sentence = file_signatures.describe_other_file(path, also_text=False)
    if sentence is None:
        sentence = (
            "is no checkpoint: it begins neither as PyTorch's files (.pth, .bin, .state) do, nor "
            "as safetensors (.safetensors, .st), nor as rwkv.cpp's (.bin), nor as "
            "llama.cpp's (.gguf)"
        )
    raise ValueError(f"`{path}` {sentence}.")


def _open_safetensors(path: Path, verify: bool) -> TensorFile:
    tensors = read_safetensors(path, verify=verify)
    metadata = dict(_open_header(path).metadata() or {})
    said = metadata.get(LOW_RANK_KEY)
    # Our own files did not say it at first; then their suffix did.
    if said is None and _DIGEST_KEY in metadata:
        said = "transposed" if path.suffix == ".st" else "official"
    low_rank = cast(LowRank, said) if said in get_args(LowRank) else None
    norm_eps = metadata.get(NORM_EPS_KEY)
    return TensorFile(tensors, low_rank, None if norm_eps is None else float(norm_eps))


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


# Under these names trainers hold a model's tensors; whatever else is there is none of the model.
_WRAPPERS = ("state_dict", "model_state_dict", "module", "model")


@prefix_errors("read_tensors")
def read_tensors(path: Path, *, verify: bool = False) -> dict[str, Tensor]:
    """Opens a file as `open_tensors` does, and returns its tensors by the names in it.

    Args:
        path: of the file.
        verify: compare the tensors with the checksums and the digest in the file.

    Raises:
        ValueError: not such a file, or no flat dict of tensors in it.
    """
    return open_tensors(path, verify=verify).tensors


def _only_holder(content: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """Returns the one dict in a dict that holds tensors, whatever its name; else the dict itself.

    Raises:
        ValueError: several hold some, and none has a usual name.
    """
    if _holds_tensors(content):
        return content
    holding = {id(inner) for inner in inner_dicts(content) if _holds_tensors(inner)}
    holders = [name for name, value in content.items() if id(value) in holding]
    if len(holders) > 1:
        first = repr(holders[0])
        second = repr(holders[1])
        raise ValueError(
            f"`{path}` holds tensors under {first} and under {second}, and no name "
            "tells which are the model's: load it with PyTorch and save one of them alone."
        )
    return content[holders[0]] if holders else content


def _holds_tensors(table: dict[Any, Any]) -> bool:
    """Tells whether a dict holds tensors; scalars may be a trainer's losses and counts."""
    arrays = [entry for entry in table.values() if isinstance(entry, np.ndarray)]
    is_read = any(array.ndim for array in arrays)
    return is_read or any(isinstance(entry, UnreadTensor) for entry in table.values())


def named_arrays(content: Any, path: Path, sums: StorageSums) -> dict[str, Tensor]:
    """Picks the arrays out of what a .pth file holds; step counts and the like are left out.

    Args:
        content: of the file.
        path: of the file, for messages.
        sums: of the file, with which a tensor is compared when all of it is read.

    Raises:
        ValueError: several dicts of tensors, or a tensor of a dtype that is not read.
    """
    # In this order, because each may hold the next.
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
    """Makes a tensor that is compared with its file's sum, unless a part alone is read."""

    def read() -> np.ndarray:
        sums.check(name, array)
        return array

    # A process that keeps a part of the tensor must not read all of it for the sum.
    return Tensor(array.shape, array.dtype, read, lambda index: array[index])


def _unread(path: Path, name: str, kind: str) -> ValueError:
    """Makes the error for a tensor of a dtype that is not read."""
    *others, last = map(str, _DTYPE_NAMES)
    return ValueError(
        f"`{path}` has {name!r} of dtype {kind}; {', '.join(others)} and {last} are "
        "read: save it in one of them."
    )


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a .safetensors file completely, or leaves what was there before.

    Args:
        path: of the file.
        tensors: name and array of each.
        metadata: texts of the header.

    Raises:
        ValueError: a dtype that the format does not have, or a folder that does not exist.
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
        ValueError: a dtype that the format does not have.
    """
    arrays = {}
    for name, array in tensors:
        if array.dtype not in _DTYPE_NAMES:
            raise ValueError(
                f"write_safetensors: `{name}` must have a dtype of the format; got {array.dtype}."
            )
        arrays[name] = array
    # Wide numbers first, as the package does, so that all of them are aligned.
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    arrays = {name: arrays[name] for name in names}
    start = file.tell()
    digest = ContentDigest()
    # The digest is known after all tensors; until then another text keeps its place.
    placeholder = digest.hexdigest()
    file.write(_safetensors_header(arrays, metadata or {}, placeholder))
    for name, array in arrays.items():
        # A scalar stays a scalar: `ascontiguousarray` alone would make it a vector of one.
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
    """Returns what a file begins with: the header's length and the header.

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
    # Blanks after the JSON move the first tensor to a multiple of 8 bytes.
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
