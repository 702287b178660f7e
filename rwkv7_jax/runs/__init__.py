"""One run of train.py: settings, modes, resuming, logging, signals and processes.

The only package with side effects on the process. Module `process` replaces hooks, streams and
signal handlers; no other module does.
"""

# Only modules that import quickly: `rwkv7 --help` must not wait for the training modes.
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
