"""`python -m pallas_kernels.tune`: measures tiles on this machine's device and prints a table row.

The printed row goes into `tiles`, where the op reads it: nothing is ever measured while a program
is traced. One kernel's tile is changed at a time, while the others stay at their best so far.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, tiles
from pallas_kernels.bench import least_ms
from pallas_kernels.cases import CASES, Case, make_inputs
from pallas_kernels.wkv7 import CHUNKS

GROUPS = (1, 2, 4, 8)
WARPS = (2, 4, 8)
STAGES = (1, 2, 3)
VALUES = (16, 32, 64, 128)

# Compiles a pass with the tiles of the moment; returns the program and its arguments.
Compile = Callable[[], tuple[Callable, tuple]]


def passes(name: str, case: Case, dtype: str) -> tuple[Compile, Compile]:
    """Makes functions that compile an implementation's two passes on the data of a case.

    Returns:
        The function for the forward pass of a gradient, and the one for the backward pass.
    """
    inputs, state = make_inputs(case, dtype)
    dy = jnp.sin(inputs.v)
    dend = jnp.cos(state)

    def forward(inputs, state):
        return dispatch.forward_saving(
            name,
            inputs,
            state,
            chunk=None,
            interpret=False,
        )

    def backward(residuals, dy, dend):
        return dispatch.backward(
            name,
            residuals,
            dy,
            dend,
            chunk=None,
            interpret=False,
        )

    def compile_forward():
        return jax.jit(forward).lower(inputs, state).compile(), (inputs, state)

    def compile_backward():
        # Made by the same choice of tiles: the kept states depend on the chunk.
        residuals = jax.jit(forward)(inputs, state)[2]
        arguments = (residuals, dy, dend)
        return jax.jit(backward).lower(*arguments).compile(), arguments

    return compile_forward, compile_backward


def milliseconds(make: Compile, choice: tiles.GPU | tiles.TPU, repeats: int) -> float:
    """Measures a pass with this choice.

    Returns:
        Milliseconds; infinity, with the reason printed, if it does not compile.
    """
    # JAX's caches do not know of the choice.
    jax.clear_caches()
    try:
        with tiles.override(choice):
            run, arguments = make()
        wall, _ = least_ms(lambda: run(*arguments), repeats=repeats)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().partition("\n")[0][:80]
        print(f"   no result  {choice}: {reason}", flush=True)
        return float("inf")
    print(f"{wall:9.3f} ms  {choice}", flush=True)
    return wall


def tune_tpu(makes: tuple[Compile, Compile], repeats: int) -> tiles.TPU:
    """Returns the choice that is fastest in both passes together."""

    def total(choice):
        return sum(milliseconds(make, choice, repeats) for make in makes)

    choices = [tiles.TPU(chunk, groups) for chunk in CHUNKS for groups in GROUPS]
    return min(choices, key=total)


def tune_gpu(makes: tuple[Compile, Compile], values: int, repeats: int) -> tiles.GPU:
    """Returns the fastest choice, tuning one kernel after the other for every chunk length."""
    forward, backward = makes
    blocks = [block for block in VALUES if block <= values]
    walking = [
        tiles.Tile(*options) for options in itertools.product(WARPS, STAGES, blocks)
    ]
    # The gradients' kernel has no loop to pipeline, and takes all value rows.
    one_chunk = [tiles.Tile(warps, 1, values) for warps in WARPS]
    plan = (
        ("forward", forward, walking),
        ("state", backward, walking),
        ("gradients", backward, one_chunk),
    )
    totals: dict[tiles.GPU, float] = {}
    for chunk in (16, 32):
        first = tiles.Tile(4, 1, min(64, values))
        choice = tiles.GPU(
            chunk,
            forward=first,
            state=first,
            gradients=first,
        )
        for kernel, make, candidates in plan:
            times: dict[tiles.GPU, float] = {}
            for tile in candidates:
                candidate = choice._replace(**{kernel: tile})
                times[candidate] = milliseconds(make, candidate, repeats)
            choice = min(times, key=lambda candidate, times=times: times[candidate])
        # With the complete choice: the kernels were tuned one by one.
        totals[choice] = sum(milliseconds(make, choice, repeats) for make in makes)
    return min(totals, key=lambda choice: totals[choice])


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints one row of the table.

    Raises:
        SystemExit: no kernel runs on this device.
    """
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune")
    parser.add_argument("--case", default="h200", choices=CASES)
    parser.add_argument(
        "--size",
        type=int,
        default=64,
        help="key and value channels of a head",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--implementation", choices=tuple(dispatch.PLATFORMS))
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args(arguments)
    device = jax.devices()[0].device_kind
    runnable = [name for name in dispatch.PLATFORMS if name in dispatch.available()]
    name = flags.implementation or next(iter(runnable), None)
    if name not in runnable:
        raise SystemExit(f"tune: no kernel to tune on {device}.")
    case = CASES[flags.case]
    case = dataclasses.replace(
        case,
        heads=max(1, case.heads * case.key_size // flags.size),
        key_size=flags.size,
        value_size=flags.size,
    )
    makes = passes(name, case, flags.dtype)
    if name == "pallas_tpu":
        best = tune_tpu(makes, flags.repeats)
    else:
        best = tune_gpu(makes, flags.size, flags.repeats)
    print(f"{name} on {device}, heads of {flags.size}: {best}")


if __name__ == "__main__":
    main()
