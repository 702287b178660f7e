"""Compiles a run's step for chips that are not here: does it fit, and what travels?

    python -m rwkv7_jax.plan --config=configs/state_tuning.py --preset=1.5b --topology=v5e-1
    python -m rwkv7_jax.plan --preset=7.2b --mode=state --batch=8 --length=4096 --topology=h100

The step is the one that train.py makes of the same settings. Nothing is loaded: a model is known by
the name of its published size, by `config.model`, or by the tensors' shapes of `config.init`.

Exit codes: 0 it fits; 3 it does not; 4 no compiler: not installed, busy, or no answer in time; 2
bad settings; 7 this machine's memory, not the chip's, is too small to compile it; 8 the compiler
fails for another reason, which the message quotes.
"""

import json
import sys
from typing import Any

from absl import flags

from rwkv7_jax.plan import table
from rwkv7_jax.plan.compiler import CompilerFailure, NoCompiler
from rwkv7_jax.plan.job import make_job
from rwkv7_jax.runs import config_flags, process
from rwkv7_jax.runs.modes.registry import MODES

DOES_NOT_FIT = 3
NO_COMPILER = 4
COMPILER_FAILS = 8

# Here the memory of this machine alone can run out.
_LESS_MEMORY = "free memory of this machine, or plan on a larger one"

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chips: v5e:2x4, v5p-128, h100, h200, a100, ..."
)
_PRESET = flags.DEFINE_string(
    "preset", None, "Published size of the model, in place of `config.init`."
)
_MODE = flags.DEFINE_enum("mode", None, list(MODES), "In place of `config.mode`.")
_BATCH = flags.DEFINE_integer("batch", None, "In place of `config.data.batch_size`.")
_LENGTH = flags.DEFINE_integer("length", None, "In place of `config.data.length`.")
_MESH = flags.DEFINE_string(
    "mesh", None, "In place of `config.mesh`: auto, or sizes such as data=2,fsdp=4."
)
_SEARCH = flags.DEFINE_boolean("search", False, "Doubles the batch while it fits.")
_TIMEOUT = flags.DEFINE_integer(
    "timeout", 1800, "Seconds after which a compilation is killed.", lower_bound=1
)
_JSON = flags.DEFINE_boolean("json", False, "Prints one JSON object.")


def _settings() -> dict[str, Any]:
    """Returns the values of the config file, if there is one, with those of the flags in place."""
    values = dict(config_flags.config_values()) if config_flags.has_config() else {}
    # A config file has a mode of its own.
    values["mode"] = _MODE.value or values.get("mode", "state")
    data = dict(values.get("data", {}))
    if _BATCH.value is not None:
        data["batch_size"] = _BATCH.value
    if _LENGTH.value is not None:
        data["length"] = _LENGTH.value
    values["data"] = data
    if _MESH.value is not None:
        values["mesh"] = _MESH.value
    return values


def main(arguments: list[str]) -> None:
    """Plans, prints, and exits with a code that says whether the step fits."""
    with process.program("plan", less_memory=_LESS_MEMORY):
        if len(arguments) > 1:
            raise ValueError(f"unknown argument {arguments[1]!r}.")
        if not _TOPOLOGY.value:
            raise ValueError(
                "`--topology` must name the chips, such as v5e:2x4 or h100."
            )
        job = make_job(_TOPOLOGY.value, _settings(), _PRESET.value)
        make = job.search if _SEARCH.value else job.compile
        try:
            plan = make(timeout=_TIMEOUT.value)
        except (NoCompiler, CompilerFailure) as error:
            print(f"plan: {error}", file=sys.stderr)
            is_none = isinstance(error, NoCompiler)
            sys.exit(NO_COMPILER if is_none else COMPILER_FAILS)
        print(json.dumps(plan, indent=1) if _JSON.value else table.describe(plan))
        sys.exit(0 if plan["fits"] else DOES_NOT_FIT)


if __name__ == "__main__":
    config_flags.run("plan", main)
