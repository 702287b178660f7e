"""Compiled programs that are kept from run to run, and the time that compiling takes."""

import os
import tempfile
from pathlib import Path

import jax
from etils import epath

from rwkv7_jax.runs.exit_codes import warn

# Every program is kept: a run has dozens of small ones, and each is read eight times as fast.
_MIN_COMPILE_SECONDS = 0.0


def user_folder() -> str | None:
    """Returns the folder of this user's programs; None where there is no place for it.

    The one that the environment names may lie in an object store, which several hosts share.
    """
    if named := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return named
    caches = os.environ.get("XDG_CACHE_HOME")
    home = os.environ.get("HOME")
    if not caches and not home:
        return None
    root = Path(caches) if caches else Path(home or "") / ".cache"
    # One folder a version: JAX never deletes programs of others.
    return str(root / "rwkv7_jax" / f"jax-{jax.__version__}")


def enable_compilation_cache(folder: str | None) -> str | None:
    """Lets JAX read compiled programs from a folder and write them to it.

    Args:
        folder: from `user_folder`; None for none.

    Returns:
        The folder, or None, after a warning, where it cannot be written.
    """
    try:
        if folder is None:
            raise OSError("neither HOME nor XDG_CACHE_HOME is set")
        # JAX's own kind of path, for object stores.
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        # Tried here: JAX would only warn, once for each program that it cannot write.
        if "://" not in folder:
            with tempfile.TemporaryFile(dir=folder):
                pass
    # Of an object store whose package is not installed.
    except (OSError, ImportError) as error:
        warn(f"programs are compiled anew each time: {error}")
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS
    )
    return folder


class CompileClock:
    """The seconds that this process has spent compiling.

    Attributes:
        seconds: since the clock was made.
    """

    def __init__(self):
        """Begins to count."""
        self.seconds = 0.0
        # JAX keeps its listeners for good: make one clock a run.
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            self.seconds += duration_secs
