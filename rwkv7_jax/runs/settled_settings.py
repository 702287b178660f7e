"""Settings that a run settles when it begins, and keeps when it goes on.

What configs leave open may be decided otherwise by a later version or on another machine; a run
that goes on must not change.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from rwkv7_jax.data.choices import PACKINGS
from rwkv7_jax.json_files import read_object
from rwkv7_jax.runs.resume.backup import STEPS
from rwkv7_jax.runs.resume.step_directories import step_numbers
from rwkv7_jax.runs.settings import Settings

# What configs leave to the machine (`config.model.dtype`) or to the data (`config.data.packing`).
AUTO = "auto"


def settings_of_run(workdir: Path) -> Mapping[str, Any]:
    """Returns the settings that the run in a folder began with; none where it has no checkpoint.

    Args:
        workdir: of the run; it may be absent.
    """
    if not step_numbers(workdir / STEPS):
        return {}
    # Of a damaged file what the checkpoints say counts, as everywhere.
    return read_object(workdir / "settings.json") or {}


def keep_packing_of_run(settings: Settings, workdir: Path) -> Settings:
    """Returns the settings with the packing that the run in a folder began with.

    Earlier versions cut rows of all data as "stream" where none was named.

    Args:
        settings: of the command.
        workdir: of the run; it may be absent.
    """
    if settings.data.packing != AUTO:
        return settings
    data = settings_of_run(workdir).get("data")
    packing = data.get("packing") if isinstance(data, dict) else None
    if packing not in PACKINGS:
        return settings
    return dataclasses.replace(
        settings, data=dataclasses.replace(settings.data, packing=packing)
    )


def settle_dtype(settings: Settings, workdir: Path) -> Settings:
    """Returns the settings with a dtype of activations in place of "auto".

    Float32 on CPUs, where 16-bit arithmetic is slower; bfloat16 elsewhere.

    Args:
        settings: of the command.
        workdir: of the run; it may be absent.
    """
    if settings.model.get("dtype") != AUTO:
        return settings
    model = settings_of_run(workdir).get("model")
    dtype = model.get("dtype") if isinstance(model, dict) else None
    if not isinstance(dtype, str):
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dataclasses.replace(settings, model={**settings.model, "dtype": dtype})
