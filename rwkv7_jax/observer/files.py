"""Observers as folders: a checkpoint of the small model, and its maps.

`model.safetensors` is a model like any other, in the official names. `maps.safetensors` holds left,
right and bias; its metadata says which sizes they fit, and what the caller wants remembered.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import load_model, model_hash, save_model
from rwkv7_jax.checkpoints.param_tree import is_finite
from rwkv7_jax.checkpoints.tensor_files import read_metadata, read_safetensors, write_safetensors
from rwkv7_jax.checkpoints.unused_value_residual import without_unused_value_residual
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.observer.observer import SIZES, Observer, check_maps, check_teacher

MODEL, MAPS = "model.safetensors", "maps.safetensors"

_MARK = "rwkv7 observer"


def save_observer(
    folder: str | Path,
    observer: Observer,
    params: Params,
    *,
    info: Mapping[str, Any] | None = None,
) -> None:
    """The observer in `folder`, dtypes kept.

    Args:
        folder: made if it does not exist; an observer in it is replaced.
        observer: which models.
        params: the observer's.
        info: what JSON can say and `observer_info` gives back: `base_model`, the teacher's
            `model_hash`, which `load_observer` can compare; the `variance` that `drift` wants.

    Raises:
        ValueError: parameters of another observer.
    """
    check_maps(observer, params, caller="save_observer")
    folder, config = Path(folder), observer.model.config
    card = {
        "mark": _MARK,
        # The implementation is the machine's choice, not the observer's.
        "observer": {**dataclasses.asdict(config), "implementation": None},
        "teacher": {name: getattr(observer.teacher, name) for name in SIZES},
        "model_hash": model_hash(params["model"], config),
        "info": dict(info or {}),
    }
    metadata = {name: json.dumps(value) for name, value in card.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / MODEL, params["model"], config)
    maps = [(name, np.asarray(params[name])) for name in observer.shapes]
    write_safetensors(folder / MAPS, maps, metadata=metadata)


def _card(folder: Path, caller: str) -> dict[str, Any]:
    """What `save_observer` wrote about the observer."""
    for name in (MODEL, MAPS):
        if not (folder / name).is_file():
            raise ValueError(f"{caller}: `{folder}` is no observer: it has no {name}.")
    try:
        card = {name: json.loads(word) for name, word in read_metadata(folder / MAPS).items()}
    except json.JSONDecodeError:
        card = {}
    if card.get("mark") != _MARK:
        raise ValueError(f"{caller}: `{folder / MAPS}` does not say that it is an observer's.")
    return card


def observer_info(folder: str | Path) -> dict[str, Any]:
    """What was given to `save_observer` as `info`.

    Raises:
        ValueError: no observer's folder.
    """
    return _card(Path(folder), "observer_info")["info"]


def _observer(card: Mapping[str, Any], folder: Path) -> Observer:
    """The shells that the card describes."""
    try:
        small, teacher = (RWKV7Config(**card[name]) for name in ("observer", "teacher"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"load_observer: `{folder / MAPS}` has no such sizes: {error}.") from None
    return Observer(RWKV7(small), teacher)


def _check_base(card: Mapping[str, Any], base_model: str | None, folder: Path) -> None:
    stored = card["info"].get("base_model")
    if base_model is not None and stored != base_model:
        known = f"belongs to {stored}" if stored else "does not say which teacher it belongs to"
        raise ValueError(f"load_observer: `{folder}` {known}; `base_model` is {base_model}.")


def load_observer(
    folder: str | Path, teacher_config: RWKV7Config, *, base_model: str | None = None
) -> tuple[Observer, Params]:
    """The observer of a folder and its parameters, in the files' dtypes.

    Args:
        folder: from `save_observer`.
        teacher_config: of the model that states are proposed for.
        base_model: that model's `model_hash`, to refuse an observer of other weights.

    Raises:
        ValueError: no observer's folder, files that do not belong together or are damaged, or a
            teacher of other sizes or weights.
    """
    folder = Path(folder)
    card = _card(folder, "load_observer")
    observer = _observer(card, folder)
    check_teacher(observer, teacher_config, caller="load_observer")
    _check_base(card, base_model, folder)
    observer = dataclasses.replace(observer, teacher=teacher_config)
    with warnings.catch_warnings():
        # Square low-rank matrices have no visible orientation; ours are in the official one.
        warnings.filterwarnings("ignore", message="the low-rank matrices are square")
        model, _ = load_model(folder / MODEL)
    if model_hash(model, observer.model.config) != card["model_hash"]:
        raise ValueError(f"load_observer: `{folder}` has {MODEL} of another {MAPS}.")
    params = {"model": without_unused_value_residual(model)}
    for name, tensor in read_safetensors(folder / MAPS).items():
        array = tensor.read()
        if not is_finite(array):
            raise ValueError(f"load_observer: `{folder / MAPS}` has NaN or Inf in {name}.")
        params[name] = jnp.asarray(array)
    check_maps(observer, params, caller="load_observer")
    return observer, params
