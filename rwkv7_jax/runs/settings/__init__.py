"""Settings of a run: dataclasses with their ranges, and functions that read and list them."""

from rwkv7_jax.runs.settings.conversion import as_config
from rwkv7_jax.runs.settings.data import DataSettings
from rwkv7_jax.runs.settings.groups import (
    EvaluationSettings,
    Mode,
    OptimizerSettings,
    Settings,
    read_settings,
)
from rwkv7_jax.runs.settings.test_time import TestTimeMethod, TestTimeSettings

__all__ = [
    "DataSettings",
    "EvaluationSettings",
    "Mode",
    "OptimizerSettings",
    "Settings",
    "TestTimeMethod",
    "TestTimeSettings",
    "as_config",
    "read_settings",
]
