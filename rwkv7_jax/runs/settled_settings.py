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
from rwkv7_jax.json_files import number_of, read_object
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.runs.settings.groups import default_final_rate

# What configs leave to the machine (`config.model.dtype`) or to the data (`config.data.packing`).
AUTO = "auto"

# The default rate of the last step in earlier versions, whatever the highest one was.
_FINAL_RATE_BEFORE = 6e-5


def settings_of_run(workdir: Path) -> Mapping[str, Any]:
    """Returns the settings that the run in a folder began with; none of a folder without a run.

    Args:
        workdir: of the run; it may be absent.
    """
    # Of a damaged file what the checkpoints say counts, as everywhere.
    return read_object(workdir / "settings.json") or {}


def settle(settings: Settings, began: Mapping[str, Any]) -> Settings:
    """Returns the settings with what they leave open as the run began, or for this machine.

    All processes of a run must be given the same `began`.

    Args:
        settings: of the command.
        began: what the run began with, from `settings_of_run`.
    """
    settings = _keep_rate(settings, _group(began, "optimizer"))
    settings = _keep_packing(settings, _group(began, "data"))
    return _settle_dtype(settings, _group(began, "model"))


def _group(began: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a group of settings; an empty one where a damaged file has something else there."""
    group = began.get(name)
    return group if isinstance(group, dict) else {}


def _keep_rate(settings: Settings, was: Mapping[str, Any]) -> Settings:
    """Returns the settings with the learning rates of the run.

    Configs that named a rate in an earlier version may leave it to the search now, and the last
    rate had another default.
    """
    rate = number_of(was.get("learning_rate"))
    final = number_of(was.get("final_learning_rate"))
    if rate is None:
        return settings
    now = settings.optimizer
    if settings.finds_rate:
        kept = dataclasses.replace(now, learning_rate=rate, final_learning_rate=final)
        return dataclasses.replace(settings, optimizer=kept)
    is_default = now.final_learning_rate == default_final_rate(now.learning_rate)
    if final != _FINAL_RATE_BEFORE or not is_default:
        return settings
    kept = dataclasses.replace(now, final_learning_rate=final)
    return dataclasses.replace(settings, optimizer=kept)


def _keep_packing(settings: Settings, was: Mapping[str, Any]) -> Settings:
    """Returns the settings with the packing of the run.

    Earlier versions cut rows of all data as "stream" where none was named.
    """
    packing = was.get("packing")
    if settings.data.packing != AUTO or packing not in PACKINGS:
        return settings
    data = dataclasses.replace(settings.data, packing=packing)
    return dataclasses.replace(settings, data=data)


def _settle_dtype(settings: Settings, was: Mapping[str, Any]) -> Settings:
    """Returns the settings with a dtype of activations in place of "auto".

    Float32 on CPUs, where 16-bit arithmetic is slower; bfloat16 elsewhere.
    """
    if settings.model.get("dtype") != AUTO:
        return settings
    dtype = was.get("dtype")
    if not isinstance(dtype, str):
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dataclasses.replace(settings, model={**settings.model, "dtype": dtype})
