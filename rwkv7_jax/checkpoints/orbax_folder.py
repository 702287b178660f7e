"""Model checkpoints as Orbax folders: a tree of arrays and the card, a JSON file with the config.

The card also lists the sizes of the tree's files, a digest of the arrays and a digest of the card
itself. Folders written by earlier versions lack these three entries.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.integrity.digests import digest_of_arrays
from rwkv7_jax.checkpoints.model_folder import (
    read_json,
    replace_folder,
    run_to_end,
)
from rwkv7_jax.checkpoints.model_vocabulary import (
    CARD_FILE,
    ENTRY,
    JSON_FILE,
    TEXT_FILE,
    keep_vocabulary,
)
from rwkv7_jax.checkpoints.orbax_import import hide_abandoned_reads, import_orbax
from rwkv7_jax.checkpoints.param_tree import (
    astype_without_overflow,
    check_all_leaves,
    official_tensors,
    require_finite_leaves,
    require_finite_params,
    require_kept,
)
from rwkv7_jax.checks import first_line
from rwkv7_jax.local_paths import require_unicode
from rwkv7_jax.model.casts import promoted
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.sharding import TENSOR, abstract_shards, check_shared_heads
from rwkv7_jax.text.tokenizer import Tokenizer

_ARRAYS = "params"

# The version of the folder's layout. It must change when names or shapes in the tree change.
_LAYOUT = 1

# Entries of the card that earlier versions lack.
_DIGEST = "digest"

_CARD_DIGEST = "card_digest"

_FILES = "files"

# The only files that a folder may hold if a new one is to replace it.
ORBAX_CONTENT = {_ARRAYS, CARD_FILE, TEXT_FILE, JSON_FILE}


def is_orbax(path: Path) -> bool:
    """Returns whether a path is a folder with the card of an Orbax checkpoint."""
    return (path / CARD_FILE).exists()


def load_orbax(
    folder: Path,
    *,
    dtype=None,
    allow_nan: bool = False,
    verify: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Params, RWKV7Config]:
    """Loads the parameters and the config of an Orbax folder.

    Args:
        folder: path of the folder; absolute, as Orbax requires.
        dtype: dtype of all leaves; None keeps the folder's.
        allow_nan: accept NaN and Inf.
        verify: check the arrays against the digest in the card, if it has one.
        mesh: mesh to shard the arrays over; None uses the default device.

    Raises:
        ValueError: the folder is damaged, its leaves do not match the config, a value is NaN or
            Inf, or a leaf is float64 and x64 is off.
    """
    card, config = _read_card(folder)
    if mesh is not None:
        check_shared_heads(config, mesh.shape.get(TENSOR, 1), "`mesh`")
    _check_files(card, folder)
    # The folder may come from a machine with another mesh, so its own shardings are ignored.
    params = _restore(
        folder / _ARRAYS,
        mesh or jax.local_devices()[0],
        folder,
        may_narrow=dtype is not None,
    )
    check_all_leaves(params, config)
    _check_card(card, folder / CARD_FILE)
    if verify and _DIGEST in card:
        _check_arrays(params, config, card, folder)
    if not allow_nan:
        require_finite_leaves(params, config, str(folder))
    if dtype is not None:
        params = astype_without_overflow(params, config, dtype, str(folder))
    return params, config


def describe_orbax(folder: Path) -> tuple[RWKV7Config, str]:
    """Reads the config and the widest dtype of an Orbax folder without reading its arrays.

    Args:
        folder: path of the folder; absolute, as Orbax requires.

    Raises:
        ValueError: the folder is damaged.
    """
    _, config = _read_card(folder)
    with _handler() as handler:
        tree = _read_list(handler, folder / _ARRAYS, folder)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(tree)]
    return config, str(promoted(*dtypes))


def _handler() -> contextlib.AbstractContextManager[Any]:
    """Opens Orbax's reader.

    Orbax's checkpointer is avoided: it makes every process wait for the others after a read, even
    for a process whose read failed.
    """
    return contextlib.closing(import_orbax().StandardCheckpointHandler())


def _read_list(handler: Any, arrays: Path, folder: Path) -> Any:
    """Reads the tree of shapes and dtypes of the stored arrays; see `_restore`."""
    return _name_damage(lambda: handler.metadata(arrays).tree, folder)


def _restore(
    arrays: Path, device: Any, folder: Path, *, may_narrow: bool = False
) -> Params:
    """Reads the tree of arrays onto one device, or sharded over a mesh.

    Args:
        arrays: the folder that Orbax wrote.
        device: the device or mesh of the arrays.
        folder: folder of the checkpoint, for error messages.
        may_narrow: read float64 as float32 if x64 is off.
    """

    def read_arrays() -> Params:
        if isinstance(device, Mesh):
            target = abstract_shards(device, tree)
        else:
            place = jax.sharding.SingleDeviceSharding(device)
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=place
                ),
                tree,
            )
        arguments = import_orbax().args.StandardRestore(target)
        return handler.restore(arrays, args=arguments)

    with _handler() as handler:
        tree = _read_list(handler, arrays, folder)
        if not may_narrow:
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                require_kept(leaf.dtype, jax.tree_util.keystr(path), str(folder))
        return _name_damage(read_arrays, folder)


def _name_damage(read: Callable[[], Any], folder: Path) -> Any:
    """Calls a function and turns any error of Orbax or its libraries into a one-line ValueError.

    A damaged folder can raise dozens of different error types.
    """
    try:
        return read()
    except Exception as error:
        hide_abandoned_reads()
        reason = first_line(error)
    # Orbax abandons the pending reads of the other arrays, and Python would warn about each of
    # them. In a context manager the error and all that it refers to would still be alive here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
    raise ValueError(f"`{folder}` is damaged or incomplete; copy it again ({reason}).")


def _read_card(folder: Path) -> tuple[dict[str, Any], RWKV7Config]:
    """Reads the card and the config in it."""
    require_unicode(folder, "`path`")
    path = folder / CARD_FILE
    card = read_json(path)
    # The layout comes first: another layout's config may have other fields.
    if card.get("layout") != _LAYOUT:
        raise ValueError(f"`{path}` has layout {card.get('layout')!r}, not {_LAYOUT}.")
    try:
        return card, RWKV7Config(**card["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"`{path}` has an unknown config: {error}.") from None


def _check_files(card: dict[str, Any], folder: Path) -> None:
    """Raises unless every file that the card lists exists with its size."""
    sizes = card.get(_FILES, {})
    if not isinstance(sizes, dict):
        raise ValueError(f"`{folder / CARD_FILE}` must list {_FILES} by name.")
    for name, size in sizes.items():
        file = folder / _ARRAYS / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            fault = (
                "is missing" if actual is None else f"has {actual:,} bytes of {size}"
            )
            raise ValueError(
                f"`{folder}` is damaged or incomplete: {_ARRAYS}/{name} {fault}; "
                "copy it again."
            )


def _check_card(card: dict[str, Any], path: Path) -> None:
    """Raises if the card was changed after it was written."""
    if _CARD_DIGEST in card and card[_CARD_DIGEST] != _digest_of_card(card):
        raise ValueError(
            f"`{path}` was changed after it was written (its digest differs); "
            f"to use it as it is, delete its entry {_CARD_DIGEST!r}."
        )


def _digest_of_card(card: dict[str, Any]) -> str:
    """Computes the digest of all entries of a card except the digest itself."""
    entries = {name: value for name, value in card.items() if name != _CARD_DIGEST}
    return digest_of_arrays([], entries)


def _check_arrays(
    params: Params, config: RWKV7Config, card: dict[str, Any], folder: Path
) -> None:
    """Raises unless the arrays are those that were written."""
    if digest_of_arrays(official_tensors(params, config)) != card[_DIGEST]:
        raise ValueError(
            f"`{folder}` is damaged: its arrays are not those that were written "
            "(their digest differs); copy it again."
        )


def has_orbax_digest(folder: Path) -> bool:
    """Returns whether an Orbax folder's card has a digest of the arrays."""
    return _DIGEST in read_json(folder / CARD_FILE)


def save_orbax(
    path: Path,
    params: Params,
    config: RWKV7Config,
    *,
    tokenizer: Tokenizer | None = None,
    allow_nan: bool = False,
) -> None:
    """Writes an Orbax folder atomically.

    The new folder is read back before it replaces an old one, because Orbax writes in the
    background.

    Args:
        path: path of the folder.
        params: the parameter tree.
        config: the config of the model.
        tokenizer: the vocabulary to store in the folder; None stores none.
        allow_nan: write NaN and Inf.

    Raises:
        ValueError: a leaf is missing, misshapen or non-finite, or the folder holds other files.
    """
    check_all_leaves(params, config)
    if not allow_nan:
        require_finite_params(params, config)

    def fill(folder: Path) -> None:
        folder.mkdir()
        arrays = jax.tree.map(jnp.asarray, params)
        # After an interrupt, Orbax's threads would keep writing into the folder during its removal.
        run_to_end(functools.partial(_write_arrays, folder / _ARRAYS, arrays))
        card: dict[str, Any] = {
            "layout": _LAYOUT,
            "config": dataclasses.asdict(config),
            _FILES: _sizes(folder / _ARRAYS),
            _DIGEST: digest_of_arrays(official_tensors(params, config)),
        }
        if tokenizer is not None:
            card[ENTRY] = keep_vocabulary(folder, tokenizer)
        # In host memory, because the accelerator may have no room for a second copy.
        host = jax.local_devices(backend="cpu")[0]
        written = _restore(folder / _ARRAYS, host, path)
        _check_arrays(written, config, card, path)
        card[_CARD_DIGEST] = _digest_of_card(card)
        text = json.dumps(card, indent=1) + "\n"
        (folder / CARD_FILE).write_text(text, encoding="utf-8")

    # Orbax refuses relative paths.
    replace_folder(path.absolute(), ORBAX_CONTENT, fill)


def _write_arrays(folder: Path, arrays: Params) -> None:
    """Writes a tree of arrays and waits until the write is complete."""
    with import_orbax().StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, arrays)
        checkpointer.wait_until_finished()


def _sizes(folder: Path) -> dict[str, int]:
    """Returns the size of each file in a folder, by its relative path."""
    sizes = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    return sizes
