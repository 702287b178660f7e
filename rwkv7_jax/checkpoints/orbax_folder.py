"""Model checkpoints as Orbax folders."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.huggingface import read_json
from rwkv7_jax.checkpoints.orbax_import import import_orbax
from rwkv7_jax.checkpoints.param_tree import official_tensors, require_finite
from rwkv7_jax.model.config import RWKV7Config

_CARD = "rwkv7_jax.json"  # beside an orbax tree: sizes and the version of the layout

_LAYOUT = 1


def _load_orbax(folder: Path, dtype, allow_nan: bool) -> tuple[Params, RWKV7Config]:
    if not (folder / _CARD).exists():
        raise ValueError(f"load_model: `{folder}` is no checkpoint: it has no {_CARD}.")
    card = read_json(folder / _CARD)
    if card.get("layout") != _LAYOUT:
        raise ValueError(f"load_model: `{folder}` has layout {card.get('layout')}, not {_LAYOUT}.")
    try:
        config = RWKV7Config(**card["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"load_model: `{folder / _CARD}` has no such config: {error}.") from None
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with import_orbax().StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder / "params").item_metadata.tree
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), stored
        )
        params = checkpointer.restore(folder / "params", like)
    if not allow_nan:
        for name, array in official_tensors(params, config):
            require_finite(array, name, str(folder))
    return jax.tree.map(lambda x: x.astype(dtype), params) if dtype else params, config


def _replace_folder(path: Path, ours: set[str], fill: Callable[[Path], None]) -> None:
    """`path` filled by `fill`, whole or not at all; only a folder of `ours` alone is replaced."""
    others = sorted({item.name for item in path.iterdir()} - ours) if path.exists() else []
    if others:
        raise ValueError(
            f"save_model: `{path}` holds other files, {others[0]} for one; "
            "give an empty or a new folder."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        fill(partial / "new")
        # Two renames, so that there is no moment in which only half a folder is left.
        if path.exists():
            os.replace(path, partial / "old")
        os.replace(partial / "new", path)
    finally:
        if not path.exists() and (partial / "old").exists():
            os.replace(partial / "old", path)
        shutil.rmtree(partial, ignore_errors=True)


def _save_orbax(path: Path, params: Params, config: RWKV7Config) -> None:
    def fill(folder: Path) -> None:
        folder.mkdir()
        with import_orbax().StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "params", jax.tree.map(jnp.asarray, params))
        card = {"layout": _LAYOUT, "config": dataclasses.asdict(config)}
        (folder / _CARD).write_text(json.dumps(card, indent=1) + "\n")

    _replace_folder(path.absolute(), {"params", _CARD}, fill)
