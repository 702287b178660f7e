"""Compiled programs kept from run to run, and how long compiling took."""

import os
import tempfile
from pathlib import Path

import jax

from rwkv7_jax.runs.exit_codes import warn

# Programs that compile faster than this are not worth a file.
_SECONDS = 0.2


def user_folder() -> Path | None:
    """Where this user's programs are kept; None where no place is known."""
    if named := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME")
    home = os.environ.get("HOME")
    if not caches and not home:
        return None
    return Path(caches or Path(home) / ".cache") / "rwkv7_jax" / f"jax-{jax.__version__}"


def enable_compilation_cache(folder: Path | None) -> Path | None:
    """Compiled programs are read from and written to `folder`, which is given back.

    Where it cannot be written, or none is known, a warning says so and None comes back.
    """
    try:
        if folder is None:
            raise OSError("neither HOME nor XDG_CACHE_HOME is set")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        warn(f"programs are compiled anew each time: {error}")
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)
    return folder


class CompileClock:
    """Counts the seconds that compiling takes in this process.

    Attributes:
        seconds: since the clock was made.
    """

    def __init__(self):
        """Counting begins."""
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            self.seconds += seconds
