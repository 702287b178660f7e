"""What a checkpoint says of itself, and whether it is true."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rwkv7_jax.runs.early_stopping import RunProgress
from rwkv7_jax.runs.resume.checksums import fingerprints, leaf_name
from rwkv7_jax.runs.resume.run_identity import require_same_run

Identity = Mapping[str, Mapping[str, str]]

_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def make_record(step: int, train: Any, course: RunProgress, identity: Identity) -> dict:
    """What a checkpoint says of itself; can be JSON."""
    record = {
        "step": step,
        "course": dataclasses.asdict(course),
        "identity": {group: dict(fields) for group, fields in identity.items()},
        "leaves": fingerprints(train),
        "versions": {name: version(name) for name in _VERSIONS},
    }
    return record | {"digest": _digest(record)}


def _digest(record: dict) -> str:
    text = json.dumps(record, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def validation_error(record: Mapping[str, Any], step: int) -> str:
    """Why a record cannot be that of a step; empty if it can."""
    record = dict(record)
    if record.pop("digest", "") != _digest(record):
        return "its record is not the one that was written"
    return "" if record["step"] == step else f"it is a copy of step {record['step']}"


def listed(kind: str, names: list[str]) -> str:
    """The kind and the first names."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{kind} {', '.join(names[:4])}{more}"


def refuse_other_leaves(workdir: Path, leaves: Mapping[str, list], train: Any) -> None:
    """Return if `train` has the leaves, shapes and dtypes that a record has.

    Raises:
        ValueError: it has others; the message has every difference.
    """
    flat = jax.tree_util.tree_leaves_with_path(train)
    now = {leaf_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in flat}
    was = {name: f"{dtype}{shape}" for name, (shape, dtype, _) in leaves.items()}
    names = dict.fromkeys([*was, *now])
    require_same_run(
        workdir,
        {name: was.get(name, "absent") for name in names},
        {name: now.get(name, "absent") for name in names},
    )


@jax.jit
def _finite(leaf: Any) -> Any:
    return jnp.all(jnp.isfinite(leaf)) if jnp.issubdtype(leaf.dtype, jnp.inexact) else True


def not_finite(params: Any) -> list[str]:
    """The leaves that hold NaN or Inf."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    fine = jax.device_get([_finite(leaf) for _, leaf in leaves])
    return [leaf_name(path) for (path, _), one in zip(leaves, fine, strict=True) if not one]
