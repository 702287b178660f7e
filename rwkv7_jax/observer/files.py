"""Observers as folders: a checkpoint of the small model, and its maps.

`model.safetensors` is a model checkpoint with official names. `maps.safetensors` holds left, right
and bias; its metadata holds the sizes of both models and the caller's own information.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.integrity.finite_numbers import is_finite
from rwkv7_jax.checkpoints.integrity.named_errors import name_file
from rwkv7_jax.checkpoints.model_files import load_model, model_hash, save_model
from rwkv7_jax.checkpoints.model_folder import replace_folder, restore_interrupted
from rwkv7_jax.checkpoints.param_tree import (
    check_all_leaves,
    require_finite_params,
)
from rwkv7_jax.checkpoints.tensor_files import (
    read_metadata,
    read_safetensors,
    write_safetensors,
)
from rwkv7_jax.checkpoints.unused_value_residual import without_unused_value_residual
from rwkv7_jax.checks import check_instance, prefix_errors
from rwkv7_jax.json_files import parse_json
from rwkv7_jax.local_paths import local_path, refuse_hub_name
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.observer.observer import SIZES, Observer, check_maps, check_teacher

MODEL = "model.safetensors"

MAPS = "maps.safetensors"

_MARK = "rwkv7 observer"

# Prefix of the temporary folder in which an observer is written next to other files.
_WORKSPACE = ".observer."


def save_observer(
    folder: str | Path,
    observer: Observer,
    params: Params,
    *,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Saves an observer to a folder; dtypes are kept.

    Args:
        folder: created if it does not exist; an observer in it is replaced.
        observer: the shells of both models.
        params: the observer's.
        info: JSON values that `observer_info` returns, such as `base_model`, the teacher's
            `model_hash`, which `load_observer` can compare, and `variance` for `proposal_error`.

    Raises:
        ValueError: parameters of another observer, NaN or Inf, or `info` that is not JSON.
        TypeError: a parameter is not floating-point.
    """
    with prefix_errors("save_observer"):
        check_instance(observer, Observer, "`observer`")
        folder = local_path(folder, "`folder`", target=True)
        check_maps(observer, params)
        _check_writable(observer, params, info)
    config = observer.model.config
    card = {
        "mark": _MARK,
        # The implementation depends on the machine.
        "observer": {**dataclasses.asdict(config), "implementation": None},
        "teacher": {name: getattr(observer.teacher, name) for name in SIZES},
        "model_hash": model_hash(params["model"], config),
        "info": dict(info or {}),
    }
    metadata = {name: json.dumps(value) for name, value in card.items()}

    def fill(new: Path) -> None:
        new.mkdir(exist_ok=True)
        save_model(new / MODEL, params["model"], config)
        maps = [(name, np.asarray(params[name])) for name in observer.shapes]
        write_safetensors(new / MAPS, maps, metadata=metadata)

    names = {MODEL, MAPS}
    others = folder.is_dir() and any(
        entry.name not in names for entry in folder.iterdir()
    )
    if others:
        # The folder cannot be replaced atomically, so both files are completed before either moves.
        with tempfile.TemporaryDirectory(dir=folder, prefix=_WORKSPACE) as workspace:
            fill(Path(workspace))
            for name in (MODEL, MAPS):
                os.replace(Path(workspace) / name, folder / name)
    else:
        with prefix_errors("save_observer"):
            replace_folder(folder, names, fill)


def _finish_interrupted(folder: Path) -> None:
    """Completes a `save_observer` that was killed between moving the model and the maps."""
    for workspace in sorted(folder.glob(f"{_WORKSPACE}*")):
        # Both files were complete before the model moved.
        if (workspace / MAPS).is_file() and not (workspace / MODEL).exists():
            with contextlib.suppress(OSError):
                os.replace(workspace / MAPS, folder / MAPS)
                workspace.rmdir()


def _check_writable(
    observer: Observer, params: Params, info: Mapping[str, Any] | None
) -> None:
    """Raises unless the loader would accept the observer."""
    config = observer.model.config
    check_all_leaves(params["model"], config)
    require_finite_params(params["model"], config)
    for name in observer.shapes:
        array = np.asarray(params[name])
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"`params[{name!r}]` must be floating-point; got {array.dtype}."
            )
        if not is_finite(array):
            raise ValueError(f"`params[{name!r}]` must be finite; got NaN or Inf.")
    try:
        json.dumps(dict(info or {}), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`info` must hold finite JSON values; got {error}.") from None


def _read_card(folder: Path) -> dict[str, Any]:
    """Reads the description that `save_observer` wrote."""
    for name in (MODEL, MAPS):
        if not (folder / name).is_file():
            raise ValueError(f"`{folder}` is not an observer: it has no {name}.")
    metadata = read_metadata(folder / MAPS)
    try:
        card = {name: parse_json(text) for name, text in metadata.items()}
    except ValueError:
        # Another program's metadata, which does not have the mark.
        card = {}
    if card.get("mark") != _MARK:
        raise ValueError(f"`{folder / MAPS}` is not from an observer.")
    return card


def observer_info(folder: str | Path) -> dict[str, Any]:
    """Returns the `info` that was given to `save_observer`.

    Raises:
        ValueError: not an observer's folder.
    """
    with prefix_errors("observer_info"):
        path = _folder_of(folder)
        with name_file(path, "observer_info"):
            return _read_card(path)["info"]


def _folder_of(folder: str | Path) -> Path:
    """Returns a folder to read from; rejects names of models on a hub."""
    path = local_path(folder, "`folder`")
    restore_interrupted(path)
    _finish_interrupted(path)
    if not path.exists():
        refuse_hub_name(folder, "`folder`")
    return path


def _observer_of(card: Mapping[str, Any], folder: Path) -> Observer:
    """Makes the shells that the card describes."""
    try:
        config = RWKV7Config(**card["observer"])
        teacher = RWKV7Config(**card["teacher"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"`{folder / MAPS}` has invalid sizes: {error}.") from None
    return Observer(RWKV7(config), teacher)


def _check_base(card: Mapping[str, Any], base_model: str | None, folder: Path) -> None:
    """Raises if the caller names a teacher and the observer does not name the same one."""
    stored = card["info"].get("base_model")
    if base_model is not None and stored != base_model:
        origin = f"belongs to {stored}" if stored else "does not name its teacher"
        raise ValueError(f"`{folder}` {origin}; `base_model` is {base_model}.")


def load_observer(
    folder: str | Path, teacher_config: RWKV7Config, *, base_model: str | None = None
) -> tuple[Observer, Params]:
    """Loads an observer and its parameters, in the files' dtypes.

    Args:
        folder: from `save_observer`.
        teacher_config: of the model for which states are proposed.
        base_model: that model's `model_hash`, to reject an observer for other weights.

    Raises:
        ValueError: not an observer's folder, files that do not belong together or are damaged, or a
            teacher of other sizes or weights.
    """
    with prefix_errors("load_observer"):
        path = _folder_of(folder)
        check_instance(teacher_config, RWKV7Config, "`teacher_config`")
    with name_file(path, "load_observer"):
        return _load(path, teacher_config, base_model)


def _load(
    folder: Path, teacher_config: RWKV7Config, base_model: str | None
) -> tuple[Observer, Params]:
    """Loads an observer and its parameters."""
    card = _read_card(folder)
    observer = _observer_of(card, folder)
    check_teacher(observer, teacher_config)
    _check_base(card, base_model, folder)
    # The file has only the teacher's sizes; dtype and implementation come from the caller.
    observer = dataclasses.replace(observer, teacher=teacher_config)
    with warnings.catch_warnings():
        # The orientation of square low-rank matrices is ambiguous; these have the official one.
        warnings.filterwarnings("ignore", message="the low-rank matrices are square")
        model, _ = load_model(folder / MODEL)
    if model_hash(model, observer.model.config) != card["model_hash"]:
        raise ValueError(
            f"`{folder}` has a {MODEL} that does not belong to its {MAPS}."
        )
    params: Params = {"model": without_unused_value_residual(model)}
    for name, tensor in read_safetensors(folder / MAPS, verify=True).items():
        array = tensor.read()
        if not is_finite(array):
            raise ValueError(f"`{folder / MAPS}` has NaN or Inf in {name}.")
        params[name] = jnp.asarray(array)
    check_maps(observer, params)
    return observer, params
