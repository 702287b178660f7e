"""`python -m pallas_kernels.tune`: measure tiles on the device at hand, print a table.

What it prints goes into `tiles`, where the op reads it: nothing is ever measured while a program is
traced. One kernel's tile is changed at a time, the others stay at their best so far.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, tiles
from pallas_kernels.bench import least_ms
from pallas_kernels.cases import CASES, make_inputs
from pallas_kernels.wkv7 import CHUNKS

GROUPS = (1, 2, 4, 8)
WARPS, STAGES, VALUES = (2, 4, 8), (1, 2, 3), (16, 32, 64, 128)


def passes(name: str, case, dtype: str) -> tuple[Callable, Callable]:
    """The saving forward pass and the backward pass of an implementation on this case's data."""
    inputs, state = make_inputs(case, dtype)
    dy, dend = jnp.sin(inputs[3]), jnp.cos(state)
    options = {"chunk": None, "interpret": False}

    def forward(inputs, state):
        return dispatch.forward_saving(name, inputs, state, **options)

    def backward(residuals, dy, dend):
        return dispatch.backward(name, residuals, dy, dend, **options)

    def run_forward():
        return jax.jit(forward).lower(inputs, state).compile(), (inputs, state)

    def run_backward():
        residuals = jax.jit(forward)(inputs, state)[2]
        arguments = (residuals, dy, dend)
        return jax.jit(backward).lower(*arguments).compile(), arguments

    return run_forward, run_backward


def milliseconds(make: Callable, choice, repeats: int) -> float:
    """Of a pass with this choice; infinite, with the reason printed, if it does not compile."""
    jax.clear_caches()
    try:
        with tiles.override(choice):
            run, arguments = make()
        found = least_ms(lambda: run(*arguments), repeats=repeats)[0]
        print(f"{found:9.3f} ms  {choice}", flush=True)
        return found
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().partition("\n")[0][:80]
        print(f"   no result  {choice}: {reason}", flush=True)
        return float("inf")


def tune_tpu(makes: tuple[Callable, Callable], repeats: int) -> tiles.TPU:
    """The fastest choice, both passes together."""
    choices = [tiles.TPU(chunk, groups) for chunk in CHUNKS for groups in GROUPS]
    return min(choices, key=lambda x: sum(milliseconds(make, x, repeats) for make in makes))


def tune_gpu(makes: tuple[Callable, Callable], values: int, repeats: int) -> tiles.GPU:
    """The fastest choice, one kernel after the other for every chunk."""
    blocks = [block for block in VALUES if block <= values]
    candidates = [tiles.Tile(*x) for x in itertools.product(WARPS, STAGES, blocks)]
    single = [tiles.Tile(warps, 1, values) for warps in WARPS]
    totals = {}
    for chunk in (16, 32):
        choice = tiles.GPU(chunk, *[tiles.Tile(4, 1, min(64, values))] * 3)
        for kernel in ("forward", "state", "gradients"):
            make = makes[kernel != "forward"]
            listed = single if kernel == "gradients" else candidates
            tried = [choice._replace(**{kernel: tile}) for tile in listed]
            choice = min(tried, key=lambda x, make=make: milliseconds(make, x, repeats))
        totals[choice] = sum(milliseconds(make, choice, repeats) for make in makes)
    return min(totals, key=totals.get)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print one row of the table.

    Raises:
        SystemExit: no kernel runs on this device.
    """
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune")
    parser.add_argument("--case", default="h200", choices=CASES)
    parser.add_argument("--size", type=int, default=64, help="key and value channels of a head")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--implementation", choices=tuple(dispatch.PLATFORMS))
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args(arguments)
    runnable = [name for name in dispatch.PLATFORMS if name in dispatch.available()]
    name = flags.implementation or next(iter(runnable), None)
    if name not in runnable:
        raise SystemExit(f"tune: no kernel to tune on {jax.devices()[0].device_kind}.")
    case = CASES[flags.case]
    heads = max(1, case.heads * case.key_size // flags.size)
    sizes = {"heads": heads, "key_size": flags.size, "value_size": flags.size}
    makes = passes(name, dataclasses.replace(case, **sizes), flags.dtype)
    if name == "pallas_tpu":
        best = tune_tpu(makes, flags.repeats)
    else:
        best = tune_gpu(makes, flags.size, flags.repeats)
    print(f"{name} on {jax.devices()[0].device_kind}, heads of {flags.size}: {best}")


if __name__ == "__main__":
    main()
