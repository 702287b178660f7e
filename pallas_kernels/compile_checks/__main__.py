"""`python -m pallas_kernels.compile_checks tpu|gpu`: compiles every kernel without its device.

It compares the numbers that the compilers report with the table next to this file, and fails if one
grew by more than 5 %. `--write` replaces the table. Each minor version of jaxlib has its own table.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pallas_kernels.compile_checks import gpu, tpu

# Compilers are deterministic, so any growth is real, but a little is not worth a failure.
TOLERANCE = 1.05
# The compilers whose versions decide the numbers.
COMPILERS = {
    "tpu": ("jaxlib", "libtpu"),
    "gpu": ("jaxlib", "jax-cuda13-plugin", "triton"),
}
ROWS: dict[str, Callable[[], Iterator[dict]]] = {"tpu": tpu.rows, "gpu": gpu.rows}


def table_path(platform: str, jaxlib: str) -> Path:
    """Returns the path of the committed table of "tpu" or "gpu" for a version of jaxlib."""
    minor = ".".join(jaxlib.split(".")[:2])
    return Path(__file__).with_name(f"{platform}-jaxlib-{minor}.json")


def versions(platform: str) -> dict[str, str]:
    """Returns the versions of the installed compilers.

    Raises:
        SystemExit: one is not installed.
    """
    try:
        return {name: version(name) for name in COMPILERS[platform]}
    except PackageNotFoundError as error:
        raise SystemExit(
            f"compile_checks {platform}: {error.name} is not installed."
        ) from error


def table_cases(platform: str) -> dict[str, dict]:
    """Reads the committed numbers of "tpu" or "gpu" by case, for the installed jaxlib."""
    path = table_path(platform, version("jaxlib"))
    return json.loads(path.read_text())["cases"]


def compare(row: dict, before: dict | None) -> list[str]:
    """Describes the numbers that are worse than before.

    Args:
        row: numbers by name.
        before: the table's numbers; None if the case is not in the table.
    """
    if before is None:
        return ["not in the table"]
    worse = []
    for name, value in row.items():
        if name in before and value > TOLERANCE * before[name]:
            worse.append(f"{name} grew from {before[name]} to {value}")
    return worse


def compile_cases(platform: str) -> dict[str, dict]:
    """Compiles every kernel and prints a line for each; returns the numbers by case."""
    began = time.monotonic()
    cases = {}
    for row in ROWS[platform]():
        case = row.pop("case")
        numbers = "  ".join(f"{name} {value}" for name, value in row.items())
        print(f"{case:<60}{numbers}", flush=True)
        # The compile time depends on the machine, so it is printed but not compared.
        row.pop("seconds", None)
        cases[case] = row
    print(f"{len(cases)} kernels in {time.monotonic() - began:.0f} s")
    return cases


def main(arguments: list[str] | None = None) -> None:
    """Compiles, prints and compares the kernels; writes the table with `--write`.

    Raises:
        SystemExit: a number is worse than in the table, or the table is for other compilers.
    """
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.compile_checks")
    parser.add_argument("platform", choices=ROWS)
    parser.add_argument("--write", action="store_true", help="replace the table")
    flags = parser.parse_args(arguments)
    installed = versions(flags.platform)
    path = table_path(flags.platform, installed["jaxlib"])
    if flags.write:
        cases = compile_cases(flags.platform)
        path.write_text(
            json.dumps({"versions": installed, "cases": cases}, indent=1) + "\n"
        )
        return
    table = {"versions": installed, "cases": {}}
    if path.exists():
        table = json.loads(path.read_text())
    if table["versions"] != installed:
        raise SystemExit(
            f"compile_checks: the table is for {table['versions']}; got {installed}."
        )
    cases = compile_cases(flags.platform)
    worse = []
    for case, row in cases.items():
        worse += [f"{case}: {text}" for text in compare(row, table["cases"].get(case))]
    worse += [f"{case}: missing" for case in table["cases"] if case not in cases]
    if worse:
        raise SystemExit("\n".join(worse))


if __name__ == "__main__":
    main()
