"""The record of a checkpoint, its metadata, and the validation of it."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rwkv7_jax.runs.early_stopping import Progress
from rwkv7_jax.runs.resume.checksums import leaf_checksums, run_on_leaves
from rwkv7_jax.runs.resume.run_identity import Identity, json_digest, require_same_run
from rwkv7_jax.sharding.layout import path_name

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")

# How many names a message lists; it only counts the others.
_NAMES_SHOWN = 4


def make_record(
    step: int, train: Any, progress: Progress, identity: Identity
) -> dict[str, Any]:
    """Returns the record of a checkpoint, serialisable as JSON.

    Args:
        step: the step of the checkpoint.
        train: the arrays to save.
        progress: the progress of the run up to this step.
        identity: from `identity_of`.
    """
    record = {
        "step": step,
        "course": progress.to_json(),
        "identity": {group: dict(fields) for group, fields in identity.items()},
        "leaves": leaf_checksums(train),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    record["digest"] = json_digest(record)
    return record


def validation_error(record: Mapping[str, Any], step: int) -> str:
    """Returns why a record is not valid for a step; empty if it is."""
    fields = dict(record)
    digest = fields.pop("digest", "")
    if digest != json_digest(fields):
        return "its record does not match its digest"
    if fields["step"] != step:
        # For example a folder that a user copied to another number; its arrays are intact.
        return f"it is a copy of step {fields['step']}"
    return ""


def list_names(kind: str, names: Sequence[str]) -> str:
    """Returns the kind and the first few names, for a message."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    hidden = len(names) - _NAMES_SHOWN
    more = f" and {hidden} more" if hidden > 0 else ""
    return f"{kind} {shown}{more}"


def require_same_leaves(workdir: Path, leaves: Mapping[str, list], train: Any) -> None:
    """Checks that a state has the leaves, shapes and dtypes of a record.

    Args:
        workdir: the run directory, for the message.
        leaves: the leaves in the record.
        train: the state; its leaves may be abstract.

    Raises:
        ValueError: they differ; the message lists every difference.
    """
    was = {name: f"{dtype}{shape}" for name, (shape, dtype, _) in leaves.items()}
    now = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(train):
        now[path_name(path)] = f"{leaf.dtype}{list(leaf.shape)}"
    # A missing leaf must count as a difference, but `require_same_run` ignores names that only one
    # side has.
    for name in dict.fromkeys([*was, *now]):
        was.setdefault(name, "absent")
        now.setdefault(name, "absent")
    require_same_run(workdir, was, now)


@jax.jit
def _all_finite(leaf: Any) -> Any:
    return (
        jnp.all(jnp.isfinite(leaf)) if jnp.issubdtype(leaf.dtype, jnp.inexact) else True
    )


def nonfinite_leaves(params: Any) -> list[str]:
    """Returns the names of leaves that contain NaN or Inf."""
    finite = run_on_leaves(_all_finite, params)
    return [name for name, one in finite.items() if not one]
