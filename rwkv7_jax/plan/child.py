"""The subprocess that compiles, because a compiler may hold a machine-wide lock, hang or crash."""

import json
import re
import sys
import time
from typing import Any

from rwkv7_jax import sharding
from rwkv7_jax.checks import first_line
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.plan.buffers import largest_arrays
from rwkv7_jax.plan.chips import Target, find_target
from rwkv7_jax.plan.collectives import find_collectives
from rwkv7_jax.plan.expected_wire import expected_wire_bytes
from rwkv7_jax.plan.hlo import parse
from rwkv7_jax.plan.steps import Step, describe_step
from rwkv7_jax.reports.system_info import installed_versions
from rwkv7_jax.runs.exit_codes import is_out_of_host_memory, is_out_of_memory
from rwkv7_jax.runs.modes.stack import StackMode
from rwkv7_jax.runs.settings import read_settings
from rwkv7_jax.training.costs import tree_bytes

_GIB = 2**30

# How compilers report the GiB of a program that does not fit.
_USED = re.compile(r"Used ([\d.]+)G of|temporaries \(([\d.]+)G\)")

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin")


def main() -> None:
    """Reads a request from stdin, compiles its step and prints the answer as JSON."""
    request = json.load(sys.stdin)
    # Output of the libraries must not mix with the answer.
    answer = sys.stdout
    sys.stdout = sys.stderr
    target = find_target(request["topology"])
    step = describe_step(
        read_settings(request["settings"]),
        RWKV7Config(**request["model"]),
        request["dtype"],
        target.devices(),
    )
    json.dump(compile_step(step, target), answer)


def compile_step(step: Step, target: Target) -> dict[str, Any]:
    """Compiles a step and describes the result; docs/cloud.md explains the keys."""
    began = time.monotonic()
    with step.on_target():
        need = step.mode.memory_estimate(step.mesh)
    devices = step.devices
    found: dict[str, Any] = {
        "devices": len(devices),
        "hosts": len({device.process_index for device in devices}),
        "device_kind": step.device.device_kind,
        "mesh": step.sizes,
        "weights_gib": _gib(tree_bytes(step.arguments[0])),
        "estimated_gib": None if need is None else _gib(need.total),
    }
    try:
        compiled = step.compile(target.platform)
    except Exception as error:
        # If this machine runs out of memory, that says nothing about the chip.
        if is_out_of_host_memory(error) or not is_out_of_memory(error):
            raise
        return found | _refused(error, step) | _ending(began)
    memory = compiled.memory_analysis()
    program = parse(compiled.as_text())
    collectives = find_collectives(program, devices=len(devices))
    peak = memory.peak_memory_in_bytes
    found |= {
        "argument_gib": _gib(memory.argument_size_in_bytes),
        "temporary_gib": _gib(memory.temp_size_in_bytes),
        "peak_gib": _gib(peak),
        "fits": peak <= target.limit * _GIB,
        "buffers": largest_arrays(program),
        "collectives": [one.table_row() for one in collectives],
        "wire_gb": round(sum(one.wire_bytes for one in collectives) / 1e9, 3),
        "expected_wire_gb": _expected_wire_gb(step),
    }
    return found | _ending(began)


def _expected_wire_gb(step: Step) -> float | None:
    """Computes the GB that a device sends by the layout; None if it reads two models or texts."""
    mode = step.mode
    # A step with an anchor reads that too, with the base and the tuned model.
    if mode.gradients_of is None or mode.settings.tuning.anchor:
        return None
    microbatches = mode.settings.optimizer.accumulate
    state = step.state
    is_stack = isinstance(mode, StackMode)
    assert mode.tokens_per_step is not None
    sent = expected_wire_bytes(
        state.params if mode.frozen is None else mode.frozen,
        step.sizes,
        trained=() if is_stack else state.params,
        dtype=mode.model.config.dtype,
        # Devices that share heads have the same tokens.
        tokens=step.sizes.get(sharding.TENSOR, 1)
        * (mode.tokens_per_step // (microbatches * len(step.devices))),
        recomputed=mode.model.config.remat == "block",
        microbatches=microbatches,
        stack=(state.params, state.opt_state) if is_stack else (),
    )
    return round(sent / 1e9, 3)


def _gib(count: int | float) -> float:
    return round(count / _GIB, 3)


def _refused(error: Exception, step: Step) -> dict[str, Any]:
    """Describes a step that the compiler rejects; the peak is the compiler's or a lower bound."""
    arguments = sharding.bytes_on_a_device(step.arguments)
    text = first_line(error, limit=None)
    used = _USED.search(text)
    temporary = float(used[2]) if used and used[2] else None
    if used and used[1]:
        peak = float(used[1])
    else:
        peak = arguments / _GIB + (temporary or 0.0)
    return {
        "argument_gib": _gib(arguments),
        "temporary_gib": temporary,
        "peak_gib": round(peak, 3),
        "fits": False,
        "reason": text[:300],
        "buffers": [],
        "collectives": [],
        "wire_gb": None,
    }


def _ending(began: float) -> dict[str, Any]:
    python = {"python": sys.version.split()[0]}
    return {
        "compile_seconds": round(time.monotonic() - began, 1),
        "versions": python | installed_versions(_PACKAGES),
    }


if __name__ == "__main__":
    main()
