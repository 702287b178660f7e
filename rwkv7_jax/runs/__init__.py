"""The life of one run of train.py: settings, modes, resuming, logging, signals, processes.

The only room with side effects on the process, and all of those are in `process`.
"""

# Only what costs little to import: `rwkv7 --help` must not pay for the modes.
from rwkv7_jax.runs.compilation_cache import enable_compilation_cache, user_folder
from rwkv7_jax.runs.monitoring.progress_bar import ProgressBar
from rwkv7_jax.runs.settings import Settings, read_settings

__all__ = [
    "ProgressBar",
    "Settings",
    "enable_compilation_cache",
    "read_settings",
    "user_folder",
]
