"""Settings that a run settles when it begins, and keeps when it goes on.

What configs leave open may be decided otherwise by a later version or on another machine; a run
that goes on must not change.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from rwkv7_jax.runs.resume.step_directories import step_numbers
from rwkv7_jax.runs.settings import Settings

# The `config.model.dtype` of configs that leave it to the machine.
AUTO = "auto"


def settings_of_run(workdir: Path) -> Mapping[str, Any]:
    """Returns the settings that the run in a folder began with; none where it has no checkpoint.

    Args:
        workdir: of the run; it may be absent.
    """
    if not step_numbers(workdir / "checkpoints"):
        return {}
    try:
        before = json.loads((workdir / "settings.json").read_text(encoding="utf-8"))
    # A damaged file: what the checkpoints say counts, as everywhere.
    except (OSError, ValueError):
        return {}
    return before if isinstance(before, dict) else {}


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
