"""The cost of a generated token on a TPU, by the compiler, without the device.

    python -m benchmarks.decode_tpu --json benchmarks/results/tpu-decode.json

libtpu compiles the decode loop ahead of time on any Linux machine; it needs only shapes. The cycles
of XLA's instructions in the loop's body are its estimates; those of the WKV kernel are the bundles
of its schedule. Both leave out how long the memory takes: compare them with the least cycles, in
which it delivers weights and states once.

"kernel" is the default. "scan" names that implementation, so XLA computes the recurrence on plain
states. "one row" is the default without idle rows, and with products of a single row left as they
are.
"""

import argparse
import dataclasses
import os
import re
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from benchmarks import record
from benchmarks.decode_compiled import CONFIG, describe_arguments, trace_loop
from benchmarks.tpu_layout import estimate_cycles
from pallas_kernels.compile_checks.__main__ import table_cases
from pallas_kernels.compile_checks.tpu import require_libtpu
from rwkv7_jax.model import products
from rwkv7_jax.plan import hlo
from rwkv7_jax.plan.chips import find_target

KERNEL = "wkv7_token_kernel"

TILE = products.TPU_ROWS


class Chip(NamedTuple):
    """A chip with one core.

    Attributes:
        hertz: of its clock, from its 16-bit products per second and the size of its matrix units.
        bytes_per_second: of its memory.
    """

    hertz: float
    bytes_per_second: float


# Source: Google's documentation of both chips: 197 and 918 TFLOP/s with four units of 128^2 and
# 256^2 multiplications, 819 and 1,640 GB/s.
CHIPS = {
    "v5e": Chip(197e12 / (4 * 128**2 * 2), 819e9),
    "v6e": Chip(918e12 / (4 * 256**2 * 2), 1640e9),
}

FORMS = {"kernel": (1, 8, 32, 256), "scan": (1, 8, 32, 256), "one row": (1,)}


def compile_loop(form: str, batch: int, chip: str) -> tuple[Any, int]:
    """Compiles the decode loop; returns it and the bytes of weights and states of a token."""
    (device,) = find_target(f"{chip}:1x1").devices()
    sharding = SingleDeviceSharding(device)

    def place(leaf, dtype=None):
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)

    config = CONFIG
    if form == "scan":
        config = dataclasses.replace(CONFIG, implementation="scan")
    params, run = describe_arguments(batch, place)
    target = Mesh(np.array([device]), ("alone",)).abstract_mesh
    with jax.sharding.use_abstract_mesh(target):
        traced = trace_loop(config, batch, place, params, run)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    weights = sum(2 * leaf.size for leaf in jax.tree.leaves(params))
    # Of the embedding, a token reads its row.
    weights -= 2 * CONFIG.vocab_size * CONFIG.width
    states = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.state))
    return compiled, weights + 2 * states


def loop_body(program: hlo.Program) -> list[hlo.Instruction]:
    """Finds the body of the loop over tokens: the one with the most cycles."""
    bodies = []
    for instructions in program.computations.values():
        for one in instructions:
            if one.operation == "while":
                (name,) = re.findall(r"body=%?([\w.\-]+)", one.rest)
                bodies.append(program.computations[name])
    return max(bodies, key=estimate_cycles)


def kernel_cycles(chip: str, heads: int, size: int) -> int:
    """Computes the cycles of the kernel for so many heads of all rows and layers."""
    cases = table_cases("tpu")
    return round(cases[f"{chip} token {size}x{size} bfloat16"]["bundles"] * heads)


def measure(form: str, batch: int, chip: str) -> dict[str, Any]:
    """Compiles one form and returns its numbers."""
    compiled, least = compile_loop(form, batch, chip)
    body = loop_body(hlo.parse(compiled.as_text() or ""))
    calls = sum(one.operation == "custom-call" and KERNEL in one.rest for one in body)
    cycles = estimate_cycles(body)
    recurrence = sum(estimate_cycles([one]) for one in body if "/wkv7/" in one.op_name)
    if calls:
        # Few rows are decoded next to idle ones.
        heads = calls * max(batch, products.TPU_ROWS) * CONFIG.num_heads
        recurrence = kernel_cycles(chip, heads, CONFIG.head_size)
        cycles += recurrence
    memory = compiled.memory_analysis()
    return {
        "cycles": cycles,
        "of the recurrence": recurrence,
        "least cycles": round(least / CHIPS[chip].bytes_per_second * CHIPS[chip].hertz),
        "temporary bytes": memory.temp_size_in_bytes,
        "kernel calls": calls,
    }


def main() -> None:
    """Prints a line for each chip, form and batch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    try:
        require_libtpu()
    except ModuleNotFoundError as error:
        raise SystemExit(f"decode_tpu: {error}") from None
    rows = {}
    for chip in args.chips:
        for form, batches in FORMS.items():
            products.TPU_ROWS = 1 if form == "one row" else TILE
            # Traces are kept, and do not depend on this number.
            jax.clear_caches()
            for batch in batches:
                row = measure(form, batch, chip)
                rows[f"{chip}, {form}, batch {batch}"] = row
                print(f"{chip} {form:>8} batch {batch:>3}", row, flush=True)
    if args.json:
        packages = ("jax", "jaxlib", "libtpu")
        record.write(args.json, "benchmarks.decode_tpu", packages=packages, rows=rows)


if __name__ == "__main__":
    main()
