"""Models as files: .pth, .safetensors, web-rwkv .st, HF folders, orbax folders."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints import tensor_names as names
from rwkv7_jax.checkpoints.huggingface import CARD, WEIGHTS, hf_config, read_hf
from rwkv7_jax.checkpoints.orbax_folder import _load_orbax, _replace_folder, _save_orbax
from rwkv7_jax.checkpoints.param_tree import (
    Progress,
    build_tree,
    check_names,
    infer_config,
    is_finite,
    official_tensors,
)
from rwkv7_jax.checkpoints.pth import write_pth
from rwkv7_jax.checkpoints.tensor_files import format_of, read_named, write_safetensors
from rwkv7_jax.model.config import RWKV7Config


def load_model(
    path: str | Path, *, dtype=None, allow_nan: bool = False, progress: Progress = None
) -> tuple[Params, RWKV7Config]:
    """The parameters of a checkpoint and the config that its tensors have.

    Every size is inferred from tensors, never from metadata. Arrays are on the default device, in
    the file's dtypes unless `dtype` is given.

    Args:
        path: an official `.pth` or `.safetensors`, a web-rwkv `.st`, an HF folder, or an orbax
            folder.
        dtype: of all parameters.
        allow_nan: take NaN and Inf as they are.
        progress: called with bytes done and bytes in all.

    Raises:
        ValueError: no such file, not RWKV-7, tensors missing or misshapen (one table), or NaN.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"load_model: `{path}` does not exist.")
    kind = format_of(path)
    if kind == "orbax":
        return _load_orbax(path.absolute(), dtype, allow_nan)
    if kind == "hf":
        named, changes = read_hf(path)
    else:
        named, changes = names.from_official(read_named(path), suffix=path.suffix), {}
    names.reject_other_architectures(named, str(path))
    named, states = names.split_states(named)
    if states and not named:
        raise ValueError(f"load_model: `{path}` is a start state; load_state reads it.")
    if states:
        warnings.warn(
            f"{path} holds a tuned state as well; load_state({str(path)!r}) gives it.", stacklevel=2
        )
    config = infer_config(named, str(path), **changes)
    check_names(named, config, str(path))
    tree = build_tree(named, config, str(path), dtype=dtype, allow_nan=allow_nan, progress=progress)
    return tree, config


def _with_dummies(params: Params, config: RWKV7Config) -> Iterator[tuple[str, np.ndarray]]:
    """Official tensors, block 0's value residual included: official trainers load strictly."""
    seen, dtype = set(), np.dtype(np.float32)
    for name, array in official_tensors(params, config):
        seen.add(name)
        dtype = array.dtype
        yield name, array
    for name, shape in names.unused_value_residual_shapes(config).items():
        if name not in seen:
            yield name, np.zeros(shape, dtype)


def _half(name: str, array: np.ndarray) -> np.ndarray:
    """The array in half precision, which is all that web-rwkv reads."""
    with np.errstate(over="ignore"):
        half = np.asarray(array).astype(np.float16)
    if not is_finite(half) and is_finite(array):
        raise ValueError(f"save_model: {name} has numbers beyond 65504, which .st cannot hold.")
    return half


def _official_items(params: Params, config: RWKV7Config, format: str):
    """Names and arrays as the format writes them."""
    if format == "hf":
        for name, array in official_tensors(params, config):
            if name not in names.unused_value_residual_shapes(config):
                array = array.swapaxes(-1, -2) if names.LOW_RANK.search(name) else array
                yield names.to_hf(name), array.reshape(names.hf_shape(name, array.shape))
        return
    for name, array in _with_dummies(params, config):
        if format == "st":
            array = _half(name, array)
            array = array.swapaxes(-1, -2) if names.LOW_RANK.search(name) else array
        yield name, array.reshape(names.file_shape(name, array.shape))


def save_model(
    path: str | Path,
    params: Params,
    config: RWKV7Config,
    *,
    format: str | None = None,
    progress: Progress = None,
) -> None:
    """The checkpoint at `path`, complete; a write that fails leaves what was there before.

    Dtypes are kept (`.st` alone is half precision by definition). Any tree of the parameters' shape
    can be saved: gradients, averages, differences.

    Args:
        path: `.pth`, `.safetensors`, `.st`; a folder otherwise.
        params: the parameter tree.
        config: its sizes.
        format: "hf" for an HF folder, where the suffix does not say it.
        progress: called with bytes done and bytes in all.

    Raises:
        ValueError: a leaf is missing or misshapen, an unknown format, or a folder with other files.
    """
    path, kind = Path(path), format_of(path, format=format)
    if kind == "hf" and not np.isclose(config.group_norm_eps, config.head_size * config.norm_eps):
        raise ValueError(
            "save_model: an HF folder says one `norm_eps` for all norms, the per-head norm's being "
            f"head_size times it; got {config.norm_eps} and {config.group_norm_eps}."
        )
    total, done = sum(leaf.nbytes for leaf in jax.tree.leaves(params)), 0

    def items():
        nonlocal done
        for name, array in _official_items(params, config, kind):
            yield name, array
            done += array.nbytes
            if progress:
                progress(min(done, total), total)

    if kind == "orbax":
        _save_orbax(path, params, config)
    elif kind == "hf":

        def fill(folder: Path) -> None:
            folder.mkdir()
            write_safetensors(folder / WEIGHTS, items(), metadata={"format": "pt"})
            card = json.dumps(hf_config(params, config), indent=2)
            (folder / CARD).write_text(card + "\n")

        _replace_folder(path.absolute(), {CARD, WEIGHTS}, fill)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        (write_pth if kind == "pth" else write_safetensors)(path, items())


def model_hash(params: Params, config: RWKV7Config) -> str:
    """A fingerprint of names, shapes, dtypes and bytes, whatever format the model came in."""
    digest = hashlib.blake2b(digest_size=16)
    skip = names.unused_value_residual_shapes(config)
    for name, array in sorted(official_tensors(params, config), key=lambda item: item[0]):
        if name not in skip:
            digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()
