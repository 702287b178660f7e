"""The memory of one step of a published size on one GPU, by rematerialisation setting.

    python -m benchmarks.remat_memory --json benchmarks/results/h100-remat-memory.json

Each row is a plan (`python -m rwkv7_jax.plan`): the step of a run, compiled for a GPU that is not
attached. Rows that are already in the file are not compiled again.
"""

import argparse
import itertools
import json
from pathlib import Path

from benchmarks import record
from benchmarks.memory_plans import KEPT
from rwkv7_jax.model import remat
from rwkv7_jax.plan.job import make_job

MODES = ("state", "pretrain")


def main() -> None:
    """Prints a row for each mode and choice, and writes them as they come."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="0.4b", help="a published size (%(default)s)")
    parser.add_argument("--topology", default="h100", help="topology, as for plans")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument(
        "--remat", nargs="+", choices=remat.CHOICES, default=remat.CHOICES
    )
    parser.add_argument("--json", required=True, help="file to write or to extend")
    args = parser.parse_args()
    file = Path(args.json)
    rows = json.loads(file.read_text())["plans"] if file.exists() else {}
    for choice, mode in itertools.product(args.remat, args.modes):
        name = f"{mode} {choice}"
        if name in rows:
            continue
        settings = {
            "mode": mode,
            "model": {"remat": choice},
            "data": {"batch_size": args.batch, "length": args.length},
        }
        plan = make_job(args.topology, settings, args.size).compile(timeout=3600)
        rows[name] = {key: plan[key] for key in KEPT}
        print(f"{name:<16}peak {plan['peak_gib']:6.2f} GiB", flush=True)
        every = [f"{one} {other}" for other in remat.CHOICES for one in MODES]
        record.write(
            args.json,
            "benchmarks.remat_memory",
            packages=("jax", "jaxlib", "jax-cuda13-plugin"),
            size=args.size,
            topology=args.topology,
            batch=args.batch,
            length=args.length,
            plans=rows,
            not_compiled=[one for one in every if one not in rows],
        )


if __name__ == "__main__":
    main()
