"""Models as files and folders: loads every supported layout and saves those in `Format`."""

import collections
import functools
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints import tensor_names
from rwkv7_jax.checkpoints.huggingface import (
    files_of_weights,
    has_tied_head,
    read_hf,
    read_norm_eps,
    require_squared_relu,
)
from rwkv7_jax.checkpoints.huggingface_writer import HF_CONTENT, save_hf
from rwkv7_jax.checkpoints.integrity.finite_numbers import overflows
from rwkv7_jax.checkpoints.integrity.named_errors import name_file
from rwkv7_jax.checkpoints.layouts.names import with_official_names
from rwkv7_jax.checkpoints.layouts.orientation import LowRank, with_official_low_rank
from rwkv7_jax.checkpoints.layouts.other_architectures import (
    reject_adapters,
    reject_other_architectures,
    reject_quantized,
    reject_split,
)
from rwkv7_jax.checkpoints.model_folder import existing_model, refuse_other_files
from rwkv7_jax.checkpoints.orbax_folder import (
    ORBAX_CONTENT,
    describe_orbax,
    is_orbax,
    load_orbax,
    save_orbax,
)
from rwkv7_jax.checkpoints.param_tree import (
    TreePath,
    check_names,
    finite_tensors,
    infer_config,
    official_tensors,
    require_float_dtype,
    require_jax_dtype,
)
from rwkv7_jax.checkpoints.pth import write_pth
from rwkv7_jax.checkpoints.tensor_files import (
    EPSILONS,
    LOW_RANK_KEY,
    Format,
    format_of,
    gguf_files,
    open_tensors,
    write_safetensors,
)
from rwkv7_jax.checkpoints.tensor_names import Tensor
from rwkv7_jax.checkpoints.tree_reader import (
    Progress,
    build_tree,
    loaded_tensors,
)
from rwkv7_jax.checkpoints.unused_value_residual import (
    add_unused_value_residual,
    drop_unused_value_residual,
)
from rwkv7_jax.checks import (
    check_choice,
    check_instance,
    prefix_errors,
)
from rwkv7_jax.local_paths import check_target, local_path, require_unicode
from rwkv7_jax.model.casts import promoted
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.int8_weights import (
    INT8,
    is_quantizable,
    origin_of,
    quantize_rows,
)
from rwkv7_jax.sharding import (
    TENSOR,
    check_shared_heads,
    is_spread,
    place,
    refuse_explicit_axes,
)
from rwkv7_jax.text.tokenizer import Tokenizer

_LARGEST_FLOAT16 = 65504

_EMBEDDING = "emb.weight"

_HEAD = "head.weight"

# Formats that are folders, and the only files that a folder may hold if it is to be replaced.
_CONTENT_OF_FOLDERS: dict[Format, set[str]] = {
    "orbax": ORBAX_CONTENT,
    "hf": HF_CONTENT,
    "transformers": HF_CONTENT,
}

# Compiled, to avoid a float copy of the matrix.
_quantize_rows = jax.jit(quantize_rows, static_argnames="origin")


def load_model(
    path: str | Path,
    *,
    dtype: Any = None,
    weights: str | None = None,
    allow_nan: bool = False,
    verify: bool = False,
    progress: Progress = None,
    mesh: Mesh | None = None,
) -> tuple[Params, RWKV7Config]:
    """Loads a checkpoint's parameters and infers its config.

    The sizes are inferred from the tensors, never from metadata. The layout is inferred from the
    tensor names, never from the path. The arrays are on the default device, or sharded over `mesh`.
    When sharded, no device or host holds a full array, and each process reads only the shards of
    its own devices.

    Args:
        path: a PyTorch, safetensors (official or web-rwkv), rwkv.cpp or GGUF file, a folder of such
            files, or an Orbax folder.
        dtype: dtype of all parameters; None keeps the file's. Activations use `config.dtype`, which
            is float32 whatever the file's dtype; change it with
            `dataclasses.replace(config, dtype="bfloat16")`.
        weights: "int8" holds the matrices of a frozen model in 8 bits (see `model.int8_weights`);
            they cannot be trained or saved. None keeps floats.
        allow_nan: accept NaN and Inf.
        verify: first check all bytes against the digests in the file, which reads it once more.
            The CRC-32 of a PyTorch tensor is always checked when the whole tensor is read.
        progress: called with the number of bytes done and the total.
        mesh: the mesh to shard over, from `sharding.make_mesh`; None uses the default device.

    Raises:
        ValueError: the file does not exist, is damaged or is not RWKV-7; tensors are missing or
            misshapen (the message lists them all); a value is NaN or Inf, or out of range for
            `dtype`; the file is float64 and x64 is off; or the mesh does not divide the heads.
        TypeError: `dtype` is not floating-point, or `path` is not a path.
        ImportError: the package `gguf`, which GGUF files need, is not installed.
    """
    with prefix_errors("load_model"):
        if dtype is not None:
            dtype = require_jax_dtype(require_float_dtype(dtype))
        path = existing_model(path)
        _check_weights(weights, allow_nan)
        if mesh is not None:
            refuse_explicit_axes(mesh, "`mesh`")
    with name_file(path, "load_model"):
        if is_orbax(path):
            folder = path.absolute()
            if weights is not None:
                return _load_orbax_in_int8(folder, dtype, mesh, verify=verify)
            return load_orbax(
                folder, dtype=dtype, allow_nan=allow_nan, verify=verify, mesh=mesh
            )
        tensors, config = _open_model(path, verify=verify)
        if mesh is not None:
            check_shared_heads(config, mesh.shape.get(TENSOR, 1), "`mesh`")
        convert = None
        if weights is not None:
            # The matrices carry the hash of all tensors, which costs one more read of the file.
            named = loaded_tensors(tensors, config, str(path), dtype=dtype)
            convert = functools.partial(_int8_leaf, _hash_tensors(named))
        params = build_tree(
            tensors,
            config,
            str(path),
            dtype=dtype,
            allow_nan=allow_nan,
            progress=progress,
            convert=convert,
            mesh=mesh,
        )
    return params, config


def _check_weights(weights: str | None, allow_nan: bool) -> None:
    """Raises if `weights` is unknown, or is int8 together with `allow_nan`."""
    if weights is None:
        return
    check_choice(weights, (INT8,), "`weights`")
    if allow_nan:
        raise ValueError(
            "`allow_nan` must be left out with int8 weights: a row with NaN or Inf has no scale."
        )


def _load_orbax_in_int8(
    folder: Path, dtype, mesh: Mesh | None, *, verify: bool
) -> tuple[Params, RWKV7Config]:
    """Loads an Orbax folder onto the devices and quantises its matrices there, one at a time.

    For the hash, the host holds one tensor at a time. Every process must take part in computing the
    hash.
    """
    params, config = load_orbax(folder, dtype=dtype, verify=verify, mesh=mesh)
    origin = model_hash(params, config)
    leaves: dict[TreePath, Any] = traverse_util.flatten_dict(params)
    # Each float matrix is freed as soon as it is quantised.
    del params
    for path in leaves:
        if is_quantizable(path, leaves[path].ndim):
            matrix = _quantize_rows(leaves[path], origin=origin)
            leaves[path] = jax.block_until_ready(matrix)
    return place(mesh, traverse_util.unflatten_dict(leaves)), config


def _int8_leaf(origin: str, path: TreePath, array: np.ndarray) -> Any:
    """Quantises a leaf, or some of its rows, to 8 bits; other leaves than matrices are kept.

    Args:
        origin: hash of the model.
        path: path of the leaf in the tree.
        array: finite values.
    """
    if not is_quantizable(path, array.ndim):
        return array
    # On the host, because the device may have no memory left for the floats.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        matrix = _quantize_rows(array, origin=origin)
    return jax.tree.map(np.asarray, matrix)


def _open_model(
    path: Path, *, verify: bool = False
) -> tuple[dict[str, Tensor], RWKV7Config]:
    """Opens a model's tensors, infers the config and checks both."""
    open_file = read_hf if path.is_dir() else open_tensors
    file = open_file(path, verify=verify)
    # First, so that another kind of file gives one sentence instead of a table of differences.
    reject_adapters(file.tensors, path)
    named = with_official_names(file.tensors, path)
    reject_other_architectures(named.tensors, path)
    reject_quantized(named.tensors, path)
    reject_split(named.tensors, path)
    tensors, state = tensor_names.split_states(named.tensors)
    # Tools of the RWKV world put states and models under the same suffixes.
    if state and not tensors:
        raise ValueError(f"`{path}` {_describe_state(path)}.")
    if state:
        warnings.warn(
            f"{path} holds a tuned state as well; load_state({str(path)!r}) gives it.",
            stacklevel=3,
        )
    low_rank = file.low_rank or named.low_rank
    tensors = with_official_low_rank(tensors, low_rank, path)
    norm_eps = file.norm_eps
    # For one file of a folder, config.json is next to it.
    folder = path if path.is_dir() else path.parent
    if named.family == "fla":
        require_squared_relu(folder)
        if norm_eps is None:
            norm_eps = read_norm_eps(folder)
    # The file of a tied head has the matrix once.
    if _EMBEDDING in tensors and _HEAD not in tensors and has_tied_head(folder):
        tensors[_HEAD] = tensors[_EMBEDDING]
    config = infer_config(
        tensors,
        str(path),
        norm_eps=norm_eps,
        group_norm_eps=file.group_norm_eps,
        family=named.family,
    )
    check_names(tensors, config, str(path))
    return tensors, config


def describe_model(path: str | Path) -> tuple[RWKV7Config, str]:
    """Infers a checkpoint's config and the widest dtype of its tensors without reading their data.

    Raises:
        ValueError: the file does not exist, is damaged or is not RWKV-7.
        ImportError: the package `gguf`, which GGUF files need, is not installed.
    """
    path = existing_model(path)
    with name_file(path, "load_model"):
        if is_orbax(path):
            return describe_orbax(path.absolute())
        tensors, config = _open_model(path)
        dtypes = [tensor.dtype for tensor in tensors.values() if tensor.shape]
        return config, str(promoted(*dtypes))


def _describe_state(path: Path) -> str:
    """Describes a path that holds only a start state, and names what reads it."""
    if path.is_file():
        return (
            "is a start state, not a model: read it with load_state in Python, with `rwkv7 state "
            "info`, `rwkv7 state convert` or `--state` on the command line, or with "
            "`--config.state` of eval.py"
        )
    names = ", ".join(file.name for file in files_of_weights(path))
    return (
        f"holds only a start state, {names}: a model's folder holds rwkv7_jax.json, or the model's "
        "weights in one file or in shards"
    )


def _web_rwkv_tensors(
    tensors: Iterable[tuple[str, np.ndarray]],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields tensors for web-rwkv: in float16, with the low-rank matrices transposed."""
    for name, array in tensors:
        # NumPy would warn of an overflow; the error below also names the tensor.
        with np.errstate(over="ignore"):
            half = np.asarray(array).astype(np.float16)
        if overflows(array, half):
            raise ValueError(
                f"`params` of a .st file must be at most {_LARGEST_FLOAT16} in magnitude; got "
                f"larger values in {name}."
            )
        if tensor_names.LOW_RANK.search(name):
            half = half.swapaxes(-1, -2)
        yield name, half


def _count_bytes(
    tensors: Iterable[tuple[str, np.ndarray]], total: int, progress: Progress
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors and reports the number of bytes consumed."""
    done = 0
    for name, array in tensors:
        yield name, array
        done += array.nbytes
        if progress:
            progress(done, total)


def check_model_target(
    path: str | Path, *, format: str | None = None
) -> tuple[Path, Format]:
    """Checks that a checkpoint can be written at a path, before its model is built or loaded.

    Args:
        path: as for `save_model`.
        format: as for `save_model`.

    Returns:
        The path with `~` expanded, and the format.

    Raises:
        ValueError: the format is unknown, the path is not writable, or the folder holds other
            files.
        ImportError: the format needs a package that is not installed.
    """
    with prefix_errors("save_model"):
        path = local_path(path, "`path`", target=True)
        check_target(path, "`path`")
        kind = format_of(path, format=format)
        if kind == "gguf":
            gguf_files()
        if kind == "orbax":
            require_unicode(path, "`path`")
        content = _CONTENT_OF_FOLDERS.get(kind)
        if content is None and path.is_dir():
            raise ValueError(
                f"`path` must name a file for .{kind}; `{path}` is a folder."
            )
        if content is not None and path.exists():
            refuse_other_files(path, content)
    return path, kind


def save_model(
    path: str | Path,
    params: Params,
    config: RWKV7Config,
    *,
    format: str | None = None,
    tokenizer: Tokenizer | None = None,
    allow_nan: bool = False,
    progress: Progress = None,
) -> None:
    """Writes a checkpoint atomically: a failed write leaves the previous one in place.

    Dtypes are kept, except in `.st` files, which are always float16. Any tree with the structure of
    the parameters can be saved: gradients, averages, differences. If the arrays are sharded over
    several processes, all processes must call this function; tensors are gathered one at a time
    and process 0 writes them.

    Args:
        path: a `.pth`, `.safetensors`, `.st` or `.gguf` file; a folder otherwise.
        params: the parameter tree.
        config: the config of the model.
        format: "hf" for a folder that flash-linear-attention and rwkv7-hf read, "transformers" for
            one with official names; None infers the format from the path.
        tokenizer: the vocabulary, for the formats that hold one: folders and GGUF. None selects the
            built-in one of the model's size where one is needed.
        allow_nan: write NaN and Inf, which `load_model` rejects unless its `allow_nan` is set.
        progress: called with the number of bytes done and the total.

    Raises:
        ValueError: a leaf is missing, misshapen or non-finite; the format is unknown; the folder
            holds other files; or the arrays for an Orbax folder are sharded over processes.
        TypeError: a leaf is not floating-point, or an argument has the wrong type.
    """
    path, kind = check_model_target(path, format=format)
    # Covers the whole write, because each tensor is checked only when it is written.
    with prefix_errors("save_model"):
        check_instance(config, RWKV7Config, "`config`")
        check_instance(params, Mapping, "`params`")
        together = any(map(is_spread, jax.tree.leaves(params)))
        if kind == "orbax":
            if together:
                raise ValueError(
                    "`params` must be on the devices of one process for an Orbax folder; save "
                    "them as .pth or .safetensors."
                )
            save_orbax(path, params, config, tokenizer=tokenizer, allow_nan=allow_nan)
            return
        # Lazy: each tensor is copied to the host only when it is written.
        tensors = official_tensors(params, config)
        try:
            if not together or jax.process_index() == 0:
                total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
                taken = _count_bytes(tensors, total, progress)
                _write(path, kind, taken, params, config, tokenizer, allow_nan)
        finally:
            if together:
                # Gathering is collective: the other processes and a failed writer must take part.
                collections.deque(tensors, maxlen=0)


def _write(
    path: Path,
    kind: str,
    tensors: Iterable[tuple[str, np.ndarray]],
    params: Params,
    config: RWKV7Config,
    tokenizer: Tokenizer | None,
    allow_nan: bool,
) -> None:
    """Writes tensors in any format except Orbax."""
    if not allow_nan:
        tensors = finite_tensors(tensors)
    if kind == "hf" or kind == "transformers":
        save_hf(path, params, config, tensors, layout=kind, tokenizer=tokenizer)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "gguf":
        gguf_files().save_gguf(path, config, tensors, tokenizer)
        return
    tensors = add_unused_value_residual(tensors, config)
    low_rank: LowRank = "official"
    if kind == "st":
        tensors = _web_rwkv_tensors(tensors)
        low_rank = "transposed"
    tensors = (
        (name, array.reshape(tensor_names.file_shape(name, array.shape)))
        for name, array in tensors
    )
    epsilons = {}
    for key, name in EPSILONS.items():
        # The official ones, which every program assumes, need no entry.
        if getattr(config, name) != getattr(RWKV7Config, name):
            epsilons[key] = repr(getattr(config, name))
    if kind == "pth":
        write_pth(path, tensors, metadata=epsilons)
    else:
        # The loader rejects a file whose orientation is ambiguous, so it is always recorded.
        metadata = {LOW_RANK_KEY: low_rank, **epsilons}
        write_safetensors(path, tensors, metadata=metadata)


def model_hash(params: Params, config: RWKV7Config) -> str:
    """Computes a hash of names, shapes, dtypes and bytes that does not depend on the file format.

    Int8 weights have the hash of the model that they were loaded from, because a state that was
    tuned on them belongs to that model.
    """
    origin = origin_of(params)
    if origin:
        return origin
    # Sorted by name: the order must not depend on how the tree was built.
    with prefix_errors("model_hash"):
        tensors = sorted(official_tensors(params, config), key=lambda item: item[0])
    return _hash_tensors(tensors)


def _hash_tensors(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """Computes the hash of a model from its tensors, which must be sorted by name."""
    digest = hashlib.blake2b(digest_size=16)
    # Some formats lack the unused tensors.
    for name, array in drop_unused_value_residual(tensors):
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
