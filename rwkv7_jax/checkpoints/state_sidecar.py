"""Sidecars of start states: metadata that the state's file cannot hold, in `<file>.json`.

A sidecar's digest covers the tensors and their description, so a sidecar of other tensors is
rejected. While a pair of files is replaced, the new sidecar holds the old one under "previous". The
one that matches the tensors is used, so an interruption at any moment leaves a loadable pair.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv7_jax.checkpoints.integrity.digests import digest_of_arrays
from rwkv7_jax.checkpoints.integrity.named_errors import name_file
from rwkv7_jax.checkpoints.model_folder import read_json
from rwkv7_jax.checkpoints.state_tensors import (
    AXES,
    TRANSPOSED_AXES,
    open_state_tensors,
)
from rwkv7_jax.checkpoints.tensor_names import Tensor
from rwkv7_jax.checks import prefix_errors

# Entries of a sidecar that describe the tensors or determine how they are read.
MEANING = (
    "format",
    "axes",
    "layers",
    "heads",
    "value_size",
    "key_size",
    "dynamics",
    "kind",
    "features",
)

# The digest of the tensors and the entries in `MEANING`, and that of all other entries.
DIGEST = "digest"

ENTRIES_DIGEST = "entries_digest"

# The old sidecar, inside a new one whose tensors may not have been written yet.
PREVIOUS = "previous"


def sidecar(path: str | Path) -> Path:
    """Returns the path of a state's sidecar: next to the path, or next to a link's target."""
    file = Path(f"{path}.json")
    if os.path.islink(path) and not file.exists():
        return Path(f"{os.path.realpath(path)}.json")
    return file


def own_entries(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the caller's entries after a JSON round-trip.

    Entries that describe the tensors are dropped, because a wrong one would make the sidecar
    unloadable.
    """
    entries = {}
    for name, value in info.items():
        if name not in (*MEANING, DIGEST, ENTRIES_DIGEST, PREVIOUS):
            entries[name] = value
    try:
        text = json.dumps(entries, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`info` must hold finite JSON values; got {error}.") from None
    entries = json.loads(text)
    _check_fields(entries)
    return entries


def _check_fields(table: Mapping[str, Any]) -> None:
    """Raises unless the entries of a sidecar that are used have the right types."""
    for name in ("axes", "dynamics", "kind", "base_model", DIGEST, ENTRIES_DIGEST):
        value = table.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"`{name}` of a state's sidecar must be a string; got {value!r}."
            )


def previous_table(path: Path) -> dict[str, Any]:
    """Returns the sidecar of the tensors that are about to be replaced."""
    try:
        return read_table(path) if path.exists() else {}
    # No need to report a damaged pair that is about to be replaced.
    except (ValueError, OSError):
        return {}


def read_table(path: Path) -> dict[str, Any]:
    """Reads all entries of a state's sidecar, including the digests; empty if there is none."""
    file = sidecar(path)
    if not file.exists():
        return {}
    with prefix_errors("read_sidecar"):
        table = read_json(file)
        if PREVIOUS in table:
            # A save was interrupted; the digest of the tensors tells which sidecar is valid.
            previous = table.pop(PREVIOUS)
            if not isinstance(previous, dict):
                raise ValueError(f"`{file}` must hold a table under {PREVIOUS!r}.")
            if table.get(DIGEST) != _digest(open_state_tensors(path), table):
                table = previous
        with name_file(file, "read_sidecar"):
            _check_fields(table)
    return table


def _digest(tensors: Mapping[str, Tensor], table: Mapping[str, Any]) -> str:
    """Computes the digest of tensors and of the sidecar's entries in `MEANING`."""
    arrays = ((name, tensor.read()) for name, tensor in tensors.items())
    meaning = {name: table[name] for name in MEANING if name in table}
    return digest_of_arrays(arrays, meaning)


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """Reads a state's sidecar without its digests; empty if there is none.

    Raises:
        ValueError: the sidecar does not hold a JSON object.
    """
    table = read_table(Path(path))
    for name in (DIGEST, ENTRIES_DIGEST):
        table.pop(name, None)
    return table


def common_base_model(paths: Sequence[str | Path]) -> str | None:
    """Returns the base model that the states' sidecars name; None if none names one.

    Raises:
        ValueError: the sidecars name different models.
    """
    first_path: dict[str, str | Path] = {}
    for path in paths:
        base = read_sidecar(path).get("base_model")
        if base is not None:
            first_path.setdefault(base, path)
    if len(first_path) > 1:
        (first, path), (other, other_path) = list(first_path.items())[:2]
        with prefix_errors("common_base_model"):
            raise ValueError(
                f"states must be of one base model; `{path}` was tuned for {first}, "
                f"`{other_path}` for {other}."
            )
    return next(iter(first_path), None)


def check_axes(table: Mapping[str, Any], stored: str, path: Path) -> None:
    """Raises if the sidecar and the file disagree on the order of the axes.

    Args:
        table: the sidecar.
        stored: the axis order of the file.
        path: path of the file.
    """
    axes = table.get("axes", stored)
    if axes not in (AXES, TRANSPOSED_AXES):
        raise ValueError(f"`{sidecar(path)}` has unknown axes {axes!r}.")
    if axes != stored:
        raise ValueError(
            f"`{path}` is transposed: its sidecar gives the axes {axes!r}, "
            f"but {path.suffix} files hold {stored!r}."
        )


def check_digests(
    table: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    path: Path,
) -> None:
    """Raises if the sidecar belongs to other tensors; warns if another entry was changed."""
    if DIGEST in table and table[DIGEST] != _digest(tensors, table):
        raise ValueError(
            f"`{sidecar(path)}` does not belong to the tensors in `{path}`: one of "
            "the two is damaged, or was changed or replaced without the other. Copy both "
            "again; to use them as they are, delete the sidecar's entry "
            f"{DIGEST!r}."
        )
    if ENTRIES_DIGEST in table:
        described = (*MEANING, DIGEST, ENTRIES_DIGEST)
        entries = {
            name: value for name, value in table.items() if name not in described
        }
        if digest_of_arrays([], entries) != table[ENTRIES_DIGEST]:
            warnings.warn(
                f"load_state: `{sidecar(path)}` was changed after it was written: one of "
                f"{', '.join(entries) or 'its entries'}.",
                # Points at the caller of `load_state`.
                stacklevel=3,
            )


def refuse_other_weights(
    stored: str | None, base_model: str | None, path: Path
) -> None:
    """Raises if the sidecar says that the state was tuned for another model."""
    if base_model is None or stored is None or stored == base_model:
        return
    # The same weights in another dtype also have another hash; only the caller can tell.
    raise ValueError(
        f"`{path}` was tuned for the model {stored}; got the model {base_model}. A state "
        "means nothing on other weights; if the weights differ only in dtype, pass "
        "`any_base=True`, --any-base or --config.any_base."
    )
