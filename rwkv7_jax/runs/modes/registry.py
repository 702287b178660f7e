"""Training modes by name."""

from pathlib import Path

from rwkv7_jax.runs.modes.base import Job
from rwkv7_jax.runs.modes.observer import observer_job
from rwkv7_jax.runs.modes.pretrain import pretrain_job
from rwkv7_jax.runs.modes.state_tuning import state_job, upscaled_job
from rwkv7_jax.runs.modes.test_time import test_time_job
from rwkv7_jax.runs.settings import Settings

MODES = {
    "pretrain": pretrain_job,
    "state": state_job,
    "upscaled_state": upscaled_job,
    "observer": observer_job,
}


def make_job(settings: Settings, folder: str | Path = ".") -> Job:
    """The work of `settings.mode`.

    Args:
        settings: of the run.
        folder: where mode "test_time" keeps what a guide wrote.

    Raises:
        ValueError: an unknown mode, or settings that the mode cannot work with.
    """
    if settings.mode == "test_time":
        return test_time_job(settings, Path(folder))
    if settings.mode not in MODES:
        known = ", ".join([*MODES, "test_time"])
        raise ValueError(f"`config.mode` must be one of {known}; got {settings.mode!r}.")
    return MODES[settings.mode](settings)
