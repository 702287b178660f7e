"""The input of a plan: a run's settings, the shapes of its model and the chips."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rwkv7_jax.checkpoints.model_files import describe_model
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.plan.chips import Target, find_target
from rwkv7_jax.plan.compiler import CompilerFailure, NoCompiler, compile_elsewhere
from rwkv7_jax.runs.exit_codes import OutOfMemory
from rwkv7_jax.runs.settings import Settings, as_config, read_settings
from rwkv7_jax.runs.settled_settings import AUTO
from rwkv7_jax.runs.waiting import report_wait

# The dtype of frozen weights in published files, and of activations on an accelerator.
_DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Job:
    """A step to compile.

    Attributes:
        settings: settings of the run.
        config: config of its model.
        dtype: dtype of frozen weights.
        target: chips to compile for.
    """

    settings: Settings
    config: RWKV7Config
    dtype: str
    target: Target

    def compile(self, *, timeout: int) -> dict[str, Any]:
        """Compiles the step; returns the plan, for JSON.

        Args:
            timeout: seconds after which the compilation is killed.

        Raises:
            NoCompiler: the compiler is unavailable or times out.
            CompilerFailure: the compiler fails for a reason other than memory.
        """
        request = {
            "topology": self.target.name,
            "settings": as_config(self.settings),
            "model": dataclasses.asdict(self.config),
            "dtype": self.dtype,
        }
        # Before the compilation, which takes minutes: the limit may be invalid.
        plan = {
            "topology": self.target.name,
            "chips": self.target.chips,
            "mode": self.settings.mode,
            "batch": self.settings.rows,
            "length": self.settings.data.length,
            "limit_gib": round(self.target.limit, 2),
        }
        with report_wait(f"the compilation of a step of {self.settings.rows} rows"):
            return plan | compile_elsewhere(self.target, request, timeout=timeout)

    def search(
        self, *, timeout: int, on_plan: Callable[[dict[str, Any]], Any] | None = None
    ) -> dict[str, Any]:
        """Doubles the rows while they fit.

        Args:
            timeout: seconds after which a compilation is killed.
            on_plan: called with each entry of `search` as soon as it is known.

        Returns:
            The last plan that fits, or the first plan if none does. Its `search` lists all plans,
            and the error if a later compilation failed.

        Raises:
            NoCompiler: the compiler is unavailable, or the first compilation times out.
            CompilerFailure: it fails at the first compilation, for a reason other than memory.
            OutOfMemory: this machine runs out of memory at the first compilation.
        """
        tried: list[dict[str, Any]] = []
        best: dict[str, Any] | None = None
        job = self
        while True:
            try:
                plan = job.compile(timeout=timeout)
            except (NoCompiler, CompilerFailure, OutOfMemory) as error:
                if best is None:
                    raise
                # The earlier plans took minutes.
                fits = False
                entry = {"batch": job.settings.rows, "error": str(error)}
            else:
                fits = plan["fits"]
                entry = {name: plan[name] for name in ("batch", "peak_gib", "fits")}
                if best is None or fits:
                    best = plan
            tried.append(entry)
            if on_plan:
                on_plan(entry)
            if not fits:
                return best | {"search": tried}
            job = job._doubled()

    def _doubled(self) -> "Job":
        """Returns the job with twice the rows."""
        settings = self.settings
        if settings.draws_its_rows:
            prompts = 2 * settings.test_time.prompts
            test_time = dataclasses.replace(settings.test_time, prompts=prompts)
            settings = dataclasses.replace(settings, test_time=test_time)
        else:
            batch_size = 2 * settings.data.batch_size
            data = dataclasses.replace(settings.data, batch_size=batch_size)
            settings = dataclasses.replace(settings, data=data)
        return dataclasses.replace(self, settings=settings)


def make_job(topology: str, values: Mapping[str, Any], preset: str | None) -> Job:
    """Makes a job from a user's choices.

    Args:
        topology: name of the chips; see `find_target`.
        values: settings of the run, as in a config file.
        preset: published size of the model; None to take the model of the settings.

    Raises:
        ValueError: one of them cannot be planned.
    """
    target = find_target(topology)
    settings = _settled(read_settings(values))
    config, dtype = _model_of(settings, preset)
    return Job(settings, config, dtype, target)


def _settled(settings: Settings) -> Settings:
    """Returns the settings with the dtype that a run on an accelerator resolves to."""
    if settings.model.get("dtype") != AUTO:
        return settings
    return dataclasses.replace(settings, model={**settings.model, "dtype": _DTYPE})


def _model_of(settings: Settings, preset: str | None) -> tuple[RWKV7Config, str]:
    """Returns the model's config, and the dtype of its weights if they are frozen."""
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
            "`--preset` must name a published size if neither `config.init` nor `config.model` "
            "is set; got none."
        )
    return RWKV7Config(**choices), _DTYPE
