"""Compiles a run's step for absent chips and reports its memory and its communication.

    python -m rwkv7_jax.plan --config=configs/state_tuning.py --preset=1.5b --topology=v5e-1
    python -m rwkv7_jax.plan --preset=7.2b --mode=state --batch=8 --length=4096 --topology=h100

The step is the one that train.py makes from the same settings. No weights are loaded: the model's
shapes come from a published size, from `config.model`, or from the tensors of `config.init`.

Exit codes:
    0: the step fits.
    2: the settings are invalid.
    3: the step does not fit.
    4: no compiler: not installed, busy, or timed out.
    7: this machine has too little memory to compile the step, whatever the chip has.
    8: the compiler fails for another reason, which the message quotes.
"""

import json
import sys
from collections.abc import Mapping
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

# Only this machine's memory can run out here.
_LESS_MEMORY = "free memory of this machine, or plan on a larger one"

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chips: v5e:2x4, v5p-128, h100, h200, a100, ..."
)
_PRESET = flags.DEFINE_string(
    "preset", None, "Published size of the model; overrides `config.init`."
)
_MODE = flags.DEFINE_enum("mode", None, list(MODES), "Overrides `config.mode`.")
_BATCH = flags.DEFINE_integer("batch", None, "Overrides `config.data.batch_size`.")
_LENGTH = flags.DEFINE_integer("length", None, "Overrides `config.data.length`.")
_MESH = flags.DEFINE_string(
    "mesh", None, "Overrides `config.mesh`: auto, or sizes such as data=2,fsdp=4."
)
_SEARCH = flags.DEFINE_boolean("search", False, "Doubles the batch while it fits.")
_TIMEOUT = flags.DEFINE_integer(
    "timeout", 1800, "Seconds after which a compilation is killed.", lower_bound=1
)
_JSON = flags.DEFINE_boolean("json", False, "Prints one JSON object.")


def _settings() -> dict[str, Any]:
    """Returns the values of the config file, if given, overridden by the flags."""
    values = dict(config_flags.config_values()) if config_flags.has_config() else {}
    # Without a config file the mode is "state".
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


def _print_entry(entry: Mapping[str, Any]) -> None:
    """Prints an entry of the search on stderr: the next one may take minutes."""
    print(f"plan: {table.describe_entry(entry)}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    """Prints the plan and exits with one of the codes above."""
    with process.program("plan", less_memory=_LESS_MEMORY):
        if len(arguments) > 1:
            raise ValueError(f"unknown argument {arguments[1]!r}.")
        if not _TOPOLOGY.value:
            raise ValueError(
                "`--topology` must name the chips, such as v5e:2x4 or h100; got none."
            )
        job = make_job(_TOPOLOGY.value, _settings(), _PRESET.value)
        try:
            if _SEARCH.value:
                plan = job.search(timeout=_TIMEOUT.value, on_plan=_print_entry)
            else:
                plan = job.compile(timeout=_TIMEOUT.value)
        except (NoCompiler, CompilerFailure) as error:
            print(f"plan: {error}", file=sys.stderr)
            is_none = isinstance(error, NoCompiler)
            sys.exit(NO_COMPILER if is_none else COMPILER_FAILS)
        print(json.dumps(plan, indent=1) if _JSON.value else table.describe(plan))
        sys.exit(0 if plan["fits"] else DOES_NOT_FIT)


if __name__ == "__main__":
    config_flags.run("plan", main)
