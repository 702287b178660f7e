"""Settings that a run fixes when it begins, and keeps when it resumes.

Another version or machine may choose differently where a config leaves a setting open, but a
resumed run must not change.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from rwkv7_jax.data.choices import PACKINGS
from rwkv7_jax.json_files import number_of
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.runs.settings.groups import default_final_rate

# Leaves the choice to the machine (`config.model.dtype`) or to the data (`config.data.packing`).
AUTO = "auto"

# The default final rate in earlier versions, regardless of the peak rate.
_FINAL_RATE_BEFORE = 6e-5


def settle(settings: Settings, began: Mapping[str, Any]) -> Settings:
    """Fills in settings that are left open: as the run began, or for this machine.

    All processes of a run must pass the same `began`.

    Args:
        settings: of the command.
        began: the settings that the run began with; empty for a new run.
    """
    settings = _keep_rate(settings, _group(began, "optimizer"))
    settings = _keep_packing(settings, _group(began, "data"))
    return _settle_dtype(settings, _group(began, "model"))


def _group(began: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a group of settings; empty if a damaged file has no such group."""
    group = began.get(name)
    return group if isinstance(group, dict) else {}


def _keep_rate(settings: Settings, was: Mapping[str, Any]) -> Settings:
    """Returns the settings with the learning rates of the run.

    A config that set a rate in an earlier version may now leave it to the search, and the final
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

    Earlier versions used "stream" for all data if no packing was set.
    """
    packing = was.get("packing")
    if settings.data.packing != AUTO or packing not in PACKINGS:
        return settings
    data = dataclasses.replace(settings.data, packing=packing)
    return dataclasses.replace(settings, data=data)


def _settle_dtype(settings: Settings, was: Mapping[str, Any]) -> Settings:
    """Returns the settings with an activation dtype in place of "auto".

    A new run uses float32 on CPUs, where 16-bit arithmetic is slower, and bfloat16 elsewhere.
    """
    if settings.model.get("dtype") != AUTO:
        return settings
    dtype = was.get("dtype")
    if not isinstance(dtype, str):
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dataclasses.replace(settings, model={**settings.model, "dtype": dtype})
