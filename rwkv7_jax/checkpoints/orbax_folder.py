"""Model checkpoints as Orbax folders: a tree of arrays, and a JSON file with the sizes."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_folder import read_json, replace_folder
from rwkv7_jax.checkpoints.orbax_import import import_orbax
from rwkv7_jax.checkpoints.param_tree import (
    check_params,
    official_tensors,
    require_finite,
)
from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.model.config import RWKV7Config

_CONFIG_FILE = "rwkv7_jax.json"

_ARRAYS = "params"

# Of the folder, not of the package. A change of names or shapes in the tree needs a new number.
_LAYOUT = 1


def load_orbax(
    folder: Path, *, dtype=None, allow_nan: bool = False
) -> tuple[Params, RWKV7Config]:
    """Loads the parameters and the config of an Orbax folder.

    Args:
        folder: absolute, as Orbax wants it.
        dtype: of all leaves; None keeps the folder's.
        allow_nan: accept NaN and Inf.

    Raises:
        ValueError: not such a folder, a tree of other leaves than the config's, or NaN.
    """
    config = _read_config(folder)
    # The folder may come from a machine with another mesh: everything goes to one device.
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def on_one_device(leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)

    with import_orbax().StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder / _ARRAYS).item_metadata.tree
        params = checkpointer.restore(
            folder / _ARRAYS, jax.tree.map(on_one_device, stored)
        )
    with prefix_errors("load_model"):
        check_params(params, config)
    if not allow_nan:
        for name, array in official_tensors(params, config):
            require_finite(array, name, str(folder))
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return params, config


def _read_config(folder: Path) -> RWKV7Config:
    """Reads the sizes that the folder's tree was saved with."""
    path = folder / _CONFIG_FILE
    if not path.exists():
        raise ValueError(
            f"load_model: `{folder}` is not a checkpoint: it has no {_CONFIG_FILE}."
        )
    table = read_json(path)
    # Checked before the config, whose fields may differ in another layout.
    if table.get("layout") != _LAYOUT:
        raise ValueError(
            f"load_model: `{folder}` has layout {table.get('layout')}, not {_LAYOUT}."
        )
    try:
        return RWKV7Config(**table["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"load_model: `{path}` has an unknown config: {error}."
        ) from None


def save_orbax(path: Path, params: Params, config: RWKV7Config) -> None:
    """Writes an Orbax folder completely, or leaves what was there before.

    Raises:
        ValueError: a leaf is missing or misshapen, or a folder with other files.
    """
    with prefix_errors("save_model"):
        check_params(params, config)

    def fill(folder: Path) -> None:
        folder.mkdir()
        with import_orbax().StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / _ARRAYS, jax.tree.map(jnp.asarray, params))
        table = {"layout": _LAYOUT, "config": dataclasses.asdict(config)}
        (folder / _CONFIG_FILE).write_text(json.dumps(table, indent=1) + "\n")

    # Orbax refuses relative paths.
    replace_folder(path.absolute(), {_ARRAYS, _CONFIG_FILE}, fill)
