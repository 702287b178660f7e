"""The memory of one step of published sizes on one chip, by the compilers, without the chips.

    python -m benchmarks.memory_plans --json benchmarks/results/tpu-plan.json

Each case is a plan (`python -m rwkv7_jax.plan`). A test compares the plans with the estimate that
train.py prints before its first step. A compilation takes one to nine minutes. Cases that are
already in the file are not compiled again, so several calls can build one table; `--cases` selects
some.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import record

# What a row of the table keeps of a plan.
KEPT = (
    "chips",
    "device_kind",
    "limit_gib",
    "weights_gib",
    "argument_gib",
    "temporary_gib",
    "peak_gib",
    "fits",
    "compile_seconds",
)


class Case(NamedTuple):
    """A step: published size, mode, rows, their tokens, and the chip."""

    size: str
    mode: str
    batch: int
    length: int
    chip: str

    @property
    def name(self) -> str:
        """How the table calls it."""
        return f"{self.size} {self.mode} {self.batch}x{self.length} {self.chip}"


# All sizes and both modes on one GPU, for which a compilation takes a minute; the smaller ones
# first. 1 x 1024 is the shape whose memory others publish for state tuning.
CASES = (
    Case("0.1b", "state", 1, 1024, "h200"),
    Case("0.1b", "pretrain", 8, 512, "h200"),
    Case("0.4b", "state", 1, 1024, "h200"),
    Case("0.4b", "pretrain", 8, 512, "h200"),
    Case("1.5b", "state", 1, 1024, "h200"),
    Case("1.5b", "pretrain", 8, 512, "h200"),
    Case("2.9b", "state", 1, 1024, "h200"),
    Case("2.9b", "pretrain", 8, 512, "h200"),
    Case("7.2b", "state", 1, 1024, "h200"),
    Case("7.2b", "pretrain", 1, 512, "h200"),
    Case("13.3b", "state", 1, 1024, "h200"),
    Case("13.3b", "pretrain", 1, 512, "h200"),
    Case("0.4b", "state", 1, 1024, "v5e-1"),
    Case("1.5b", "state", 1, 1024, "v5e-1"),
    Case("2.9b", "state", 1, 1024, "v5e-1"),
)


def make_plan(case: Case) -> dict[str, Any]:
    """Compiles a case in separate processes."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rwkv7_jax.plan", "--json"),
            f"--preset={case.size}",
            f"--mode={case.mode}",
            f"--batch={case.batch}",
            f"--length={case.length}",
            f"--topology={case.chip}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    # Whether it fits is in the plan, too.
    if not done.stdout:
        raise SystemExit(f"{case.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def main() -> None:
    """Prints a row for each case and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", help="names of cases; all by default")
    parser.add_argument("--json", required=True, help="file to write or to extend")
    args = parser.parse_args()
    file = Path(args.json)
    rows = json.loads(file.read_text())["cases"] if file.exists() else {}
    for case in CASES:
        wanted = args.cases is None or case.name in args.cases
        if case.name in rows or not wanted:
            continue
        plan = make_plan(case)
        rows[case.name] = case._asdict() | {name: plan[name] for name in KEPT}
        print(
            f"{case.name:<36}peak {plan['peak_gib']:7.2f} GiB  {plan['compile_seconds']:.0f} s",
            flush=True,
        )
        record.write(
            args.json,
            "benchmarks.memory_plans",
            packages=("jax", "jaxlib", "libtpu", "jax-cuda13-plugin"),
            cases=rows,
            not_compiled=[one.name for one in CASES if one.name not in rows],
        )


if __name__ == "__main__":
    main()
