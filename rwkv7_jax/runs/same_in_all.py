"""Checks that all processes of a run have the same settings, files, versions and data.

Otherwise a run may wait for ever, or train something that no process was asked for.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from rwkv7_jax.reports.system_info import versions
from rwkv7_jax.runs.process_group import ProcessGroup
from rwkv7_jax.runs.resume.run_identity import (
    CONTENT,
    Identity,
    all_settings,
    content_digests,
    path_settings,
    places_of,
    without_paths,
)
from rwkv7_jax.runs.settings import Settings

# Packages whose versions decide what a run computes, and in which order processes communicate.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")

# The folder of the packages whose code decides the same.
_CODE = Path(__file__).parents[2]

_ABSENT = "absent"


def require_same_command(group: ProcessGroup, settings: Settings) -> None:
    """Checks settings, code and versions, and that no process lacks a file.

    Paths may differ between processes; `require_same_inputs` compares their content.

    Args:
        group: the processes of the run.
        settings: settings of this process.

    Raises:
        ValueError: the processes differ; all of them raise it.
    """
    if group.size == 1:
        return
    named = all_settings(settings)
    described = {}
    for name, text in without_paths(named).items():
        described[f"`config.{name}`"] = text
    for name, text in path_settings(named).items():
        described[f"the file of `config.{name}`"] = _presence(text)
    paths = {
        # Evaluations read it, and a run that stops early must stop everywhere.
        "retention": settings.evaluation.retention,
        # Small files that all processes read between collectives, where none may fail alone.
        "start": settings.start,
        "context": settings.test_time.context,
    }
    digests = group.run_in_all(lambda: content_digests(paths))
    for name, digest in digests.items():
        described[f"the digest of {name}"] = digest
    for name, version in versions(_PACKAGES).items():
        described[f"the version of {name}"] = version
    described["the code of rwkv7_jax"] = _code_digest()
    require_same(group, described)


def require_same_inputs(group: ProcessGroup, identity: Identity) -> None:
    """Checks that all processes read the same model and the same data.

    Args:
        group: the processes of the run.
        identity: of the run, in this process.

    Raises:
        ValueError: the processes differ; all of them raise it.
    """
    inputs = identity["inputs"]
    described = {}
    for name, digest in inputs.items():
        # A digest without the suffix may depend on the path, which may differ.
        if name + CONTENT not in inputs:
            described[f"the digest of {name}"] = digest
    for name, text in identity["model"].items():
        described[f"`{name}` of the model"] = text
    require_same(group, described)


def require_same(group: ProcessGroup, described: Mapping[str, str]) -> None:
    """Checks that all processes describe themselves in the same way.

    Args:
        group: the processes of the run.
        described: what this process has, by the names in the message.

    Raises:
        ValueError: the processes differ; all of them raise it.
    """
    first, *others = group.allgather(described)
    for index, other in enumerate(others, 1):
        for name in {**first, **other}:
            ours = first.get(name, _ABSENT)
            theirs = other.get(name, _ABSENT)
            if ours != theirs:
                raise ValueError(
                    "all processes of a run must have the same settings, files and versions: "
                    f"{name} is {ours} in process 0, and {theirs} in process {index}."
                )


def _presence(paths: str) -> str:
    """Tells which paths of a setting exist; names of tasks and built-in texts do not."""
    found = []
    for path in places_of(paths):
        # Not `Path.exists`: it raises for a text that is too long for a path.
        exists = os.path.exists(path)
        found.append("present" if exists else _ABSENT)
    return ", ".join(found)


def _code_digest() -> str:
    """Returns the digest of the source code."""
    digest = hashlib.blake2b(digest_size=8)
    for package in ("pallas_kernels", "rwkv7_jax"):
        for file in sorted((_CODE / package).rglob("*.py")):
            digest.update(f"{file.relative_to(_CODE)}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
