"""`python -m pallas_kernels.compile_checks tpu|gpu`: compile every kernel without its device.

What the compilers tell of it is compared with the table beside this file: anything that grew by
more than a twentieth fails. `--write` makes the table anew.
"""

import argparse
import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pallas_kernels.compile_checks import gpu as gates_gpu
from pallas_kernels.compile_checks import tpu as gates_tpu

TOLERANCE = 1.05
# The compilers whose versions decide the numbers.
COMPILERS = {"tpu": ("jaxlib", "libtpu"), "gpu": ("jaxlib", "jax-cuda13-plugin", "triton")}
ROWS = {"tpu": gates_tpu.rows, "gpu": gates_gpu.rows}


def table_path(platform: str) -> Path:
    """The committed table of "tpu" or "gpu"."""
    return Path(__file__).with_name(f"{platform}.json")


def versions(platform: str) -> dict[str, str]:
    """Of the compilers.

    Raises:
        SystemExit: one is not installed.
    """
    try:
        return {name: version(name) for name in COMPILERS[platform]}
    except PackageNotFoundError as error:
        raise SystemExit(f"compile_checks {platform}: {error.name} is not installed.") from error


def compare(row: dict, before: dict | None) -> list[str]:
    """What is worse than before, in words.

    Args:
        row: numbers by name, with the case.
        before: those of the table; None if it has no such case.
    """
    if before is None:
        return ["not in the table"]
    return [
        f"{name} grew from {before[name]} to {value}"
        for name, value in row.items()
        if name in before and value > TOLERANCE * before[name]
    ]


def main(arguments: list[str] | None = None) -> None:
    """Compile, print, compare; write the table where asked.

    Raises:
        SystemExit: something is worse than in the table, or the table is another compiler's.
    """
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.compile_checks")
    parser.add_argument("platform", choices=ROWS)
    parser.add_argument("--write", action="store_true", help="make the table anew")
    flags = parser.parse_args(arguments)
    here, path = versions(flags.platform), table_path(flags.platform)
    table = json.loads(path.read_text()) if path.exists() else {"versions": here, "cases": {}}
    if not flags.write and table["versions"] != here:
        raise SystemExit(
            f"compile_checks: the table is for {table['versions']}; installed are {here}."
        )
    began, cases, worse = time.monotonic(), {}, []
    for row in ROWS[flags.platform]():
        case = row.pop("case")
        numbers = "  ".join(f"{name} {value}" for name, value in row.items())
        print(f"{case:<56}{numbers}", flush=True)
        row.pop("seconds", None)
        cases[case] = row
        if not flags.write:
            worse += [f"{case}: {text}" for text in compare(row, table["cases"].get(case))]
    worse += [f"{case}: gone" for case in table["cases"] if case not in cases and not flags.write]
    print(f"{len(cases)} kernels in {time.monotonic() - began:.0f} s")
    if flags.write:
        path.write_text(json.dumps({"versions": here, "cases": cases}, indent=1) + "\n")
    if worse:
        raise SystemExit("\n".join(worse))


if __name__ == "__main__":
    main()
