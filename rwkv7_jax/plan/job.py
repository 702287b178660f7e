"""What is planned: a run's settings, the sizes of its model and the chips."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rwkv7_jax.checkpoints.model_files import describe_model
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.plan.chips import Target, find_target
from rwkv7_jax.plan.compiler import compile_elsewhere
from rwkv7_jax.runs.settings import Settings, as_config, read_settings
from rwkv7_jax.runs.settled_settings import AUTO

# Of frozen weights, as published files hold them, and of activations on an accelerator.
_DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Job:
    """A step to compile.

    Attributes:
        settings: of the run.
        config: of its model.
        dtype: of frozen weights.
        target: chips.
    """

    settings: Settings
    config: RWKV7Config
    dtype: str
    target: Target

    def compile(self, *, timeout: int) -> dict[str, Any]:
        """Compiles the step; returns the plan, fit for JSON.

        Args:
            timeout: seconds until the compiler is given up.

        Raises:
            NoCompiler: it gives no answer.
            CompilerFailure: it fails, and not for want of memory.
        """
        request = {
            "topology": self.target.name,
            "settings": as_config(self.settings),
            "model": dataclasses.asdict(self.config),
            "dtype": self.dtype,
        }
        found = compile_elsewhere(self.target, request, timeout=timeout)
        plan = {
            "topology": self.target.name,
            "chips": self.target.chips,
            "mode": self.settings.mode,
            "batch": self.settings.data.batch_size,
            "length": self.settings.data.length,
            "limit_gib": round(self.target.limit, 2),
        }
        return plan | found

    def search(self, *, timeout: int) -> dict[str, Any]:
        """Doubles the rows while they fit; returns the last plan that does, or the first of all.

        Its `search` lists all plans that were made.

        Args:
            timeout: seconds until a compilation is given up.

        Raises:
            NoCompiler: there is no answer for one of them.
            CompilerFailure: the compiler fails for one of them.
        """
        tried = []
        best: dict[str, Any] | None = None
        rows = self.settings.data.batch_size
        while True:
            plan = self._with_rows(rows).compile(timeout=timeout)
            tried.append({name: plan[name] for name in ("batch", "peak_gib", "fits")})
            if best is None or plan["fits"]:
                best = plan
            if not plan["fits"]:
                return best | {"search": tried}
            rows *= 2

    def _with_rows(self, rows: int) -> "Job":
        data = dataclasses.replace(self.settings.data, batch_size=rows)
        settings = dataclasses.replace(self.settings, data=data)
        return dataclasses.replace(self, settings=settings)


def make_job(topology: str, values: Mapping[str, Any], preset: str | None) -> Job:
    """Makes a job of what a user names.

    Args:
        topology: a name of chips.
        values: the settings of the run, as a config file has them.
        preset: published size of the model; None where the settings say which it is.

    Raises:
        ValueError: one of them cannot be planned.
    """
    target = find_target(topology)
    settings = _settled(read_settings(values))
    config, dtype = _model_of(settings, preset)
    return Job(settings, config, dtype, target)


def _settled(settings: Settings) -> Settings:
    """Returns the settings with the dtype that a run on an accelerator settles."""
    if settings.model.get("dtype") != AUTO:
        return settings
    return dataclasses.replace(settings, model={**settings.model, "dtype": _DTYPE})


def _model_of(settings: Settings, preset: str | None) -> tuple[RWKV7Config, str]:
    """Finds the model's sizes, and the dtype of its weights where they are frozen."""
    choices = dict(settings.model)
    choices.pop("weights", None)
    if preset is not None:
        published = {"dtype": _DTYPE, "remat": "block"} | choices
        return RWKV7Config.preset(preset, **published), _DTYPE
    if settings.init is not None:
        config, dtype = describe_model(settings.init)
        return dataclasses.replace(config, **choices), dtype
    if not choices:
        raise ValueError(
            "`--preset` must name a published size where neither `config.init` nor `config.model` "
            "says which model is planned."
        )
    return RWKV7Config(**choices), _DTYPE
