"""The memory of a state tuning step of a published size, by the compiler of a TPU, without it.

    python -m benchmarks.step_memory --json benchmarks/results/tpu-step-memory.json

libtpu compiles the step ahead of time (`pip install "rwkv7_jax[tpu]"`) on any Linux machine; it
needs only shapes. Rows are the forms of the frozen weights: bfloat16, as in published files, and 8
bits. The peak is the compiler's, with the optimizer's moments; the compiler also decides whether
the step fits a chip.
"""

import argparse
import os
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax

import rwkv7_jax as rwkv
from benchmarks import record
from rwkv7_jax.plan.job import make_job
from rwkv7_jax.plan.steps import describe_step

# One chip of each, by the names that plans take.
CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}
FORMS = ("bfloat16", "int8")
GIB = 2**30


def compile_step(
    size: str, form: str, *, chip: str, batch: int, length: int
) -> dict[str, Any]:
    """Compiles one step and returns the compiler's bytes, by name.

    Args:
        size: a published one.
        form: of the frozen weights, of `FORMS`.
        chip: of `CHIPS`.
        batch: rows.
        length: tokens of a row.
    """
    settings = {
        "mode": "state",
        "model": {"weights": form} if form == "int8" else {},
        "data": {"batch_size": batch, "length": length},
    }
    job = make_job(CHIPS[chip], settings, size)
    step = describe_step(job.settings, job.config, job.dtype, job.target.devices())
    began = time.monotonic()
    compiled = step.compile(job.target.platform)
    memory = compiled.memory_analysis()
    weights = jax.tree.leaves(step.mode.frozen)
    with step.on_target():
        estimate = step.mode.memory_estimate()
    assert estimate is not None
    return {
        "weights": sum(leaf.size * leaf.dtype.itemsize for leaf in weights),
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "estimated": estimate.total,
        "float_stacks": count_float_stacks(compiled.as_text(), job.config),
        "seconds": round(time.monotonic() - began),
    }


def count_float_stacks(text: str, config: rwkv.RWKV7Config) -> int:
    """Counts instructions of a program that make all layers' feed-forward weights as floats."""
    stack = f"[{config.num_layers - 1},{config.ffn_width},{config.width}]"
    return sum(text.count(f" = {kind}{stack}") for kind in ("bf16", "f32"))


def main() -> None:
    """Prints a row for each form; with `--json`, writes them with versions, date and command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="7.2b", help="a published size (%(default)s)")
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    rows = {}
    for form in args.forms:
        row = compile_step(
            args.size, form, chip=args.chip, batch=args.batch, length=args.length
        )
        rows[form] = row
        sizes = {name: row[name] / GIB for name in ("weights", "temporary", "peak")}
        shown = "  ".join(f"{name} {size:.2f} GiB" for name, size in sizes.items())
        print(f"{form:<10}{shown}  {row['seconds']} s", flush=True)
    if args.json:
        record.write(
            args.json,
            "benchmarks.step_memory",
            packages=("jax", "jaxlib", "libtpu"),
            model=args.size,
            chip=args.chip,
            batch=args.batch,
            length=args.length,
            bytes=rows,
        )


if __name__ == "__main__":
    main()
