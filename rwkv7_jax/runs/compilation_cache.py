"""The persistent compilation cache, and the time spent compiling."""

import os
import tempfile
from pathlib import Path

import jax
from etils import epath

from rwkv7_jax.runs.exit_codes import warn

# Cache every program: a run has dozens of small ones, and reading one is eight times as fast as
# compiling it.
_MIN_COMPILE_SECONDS = 0.0


def user_folder() -> str | None:
    """Returns the folder for this user's compiled programs; None if the environment has none.

    `JAX_COMPILATION_CACHE_DIR` may name a folder in an object store, which several hosts share.
    """
    if named := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return named
    caches = os.environ.get("XDG_CACHE_HOME")
    home = os.environ.get("HOME")
    if not caches and not home:
        return None
    root = Path(caches) if caches else Path(home or "") / ".cache"
    # One folder per version: JAX never deletes the programs of other versions.
    return str(root / "rwkv7_jax" / f"jax-{jax.__version__}")


def enable_compilation_cache(folder: str | None) -> str | None:
    """Makes JAX read compiled programs from a folder and write them to it.

    Args:
        folder: from `user_folder`; None disables the cache.

    Returns:
        The folder. None, after a warning, if there is no folder or it cannot be written.
    """
    try:
        if folder is None:
            raise OSError("neither HOME nor XDG_CACHE_HOME is set")
        # JAX's own path class, which also opens object stores.
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        # Try to write here: JAX would only warn, once for each program that it cannot write.
        if "://" not in folder:
            with tempfile.TemporaryFile(dir=folder):
                pass
    # ImportError: the package for the object store is not installed.
    except (OSError, ImportError) as error:
        warn(f"the compilation cache is disabled: {error}")
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS
    )
    return folder


class CompileClock:
    """The time that this process spends compiling.

    Attributes:
        seconds: the time spent since the clock was created.
    """

    def __init__(self):
        """Starts counting."""
        self.seconds = 0.0
        # JAX never removes a listener, so a run should create only one clock.
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            self.seconds += duration_secs
