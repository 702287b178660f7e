"""Settings of a run: dataclasses with their ranges, and functions that read and list them."""

from rwkv7_jax.runs.settings.conversion import as_config
from rwkv7_jax.runs.settings.data import DataSettings
from rwkv7_jax.runs.settings.groups import (
    EvaluationSettings,
    Mode,
    ObserverSettings,
    OptimizerSettings,
    SampleSettings,
    Settings,
    read_settings,
)
from rwkv7_jax.runs.settings.test_time import TestTimeMethod, TestTimeSettings
from rwkv7_jax.runs.settings.tuning import (
    DecorrelationSettings,
    TuningSettings,
    UpscalingSettings,
)

__all__ = [
    "DataSettings",
    "DecorrelationSettings",
    "EvaluationSettings",
    "Mode",
    "ObserverSettings",
    "OptimizerSettings",
    "SampleSettings",
    "Settings",
    "TestTimeMethod",
    "TestTimeSettings",
    "TuningSettings",
    "UpscalingSettings",
    "as_config",
    "read_settings",
]
