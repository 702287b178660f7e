"""The result file of a benchmark: date, command, device, versions and the numbers."""

import datetime
import json
import sys
from pathlib import Path
from typing import Any


def folder(path: str) -> Path:
    """Makes a folder for results, before the work for them begins; for `argparse`."""
    made = Path(path)
    made.mkdir(parents=True, exist_ok=True)
    return made


def write(
    path: str,
    module: str,
    *,
    packages: tuple[str, ...] = ("jax",),
    **numbers: Any,
) -> None:
    """Writes one run's numbers as JSON.

    Args:
        path: the file; its folder is made.
        module: the benchmark's, as `python -m` takes it.
        packages: whose versions matter.
        **numbers: the results.
    """
    # Imported late: child processes that measure memory import this module and must not load JAX.
    from rwkv7_jax.reports.system_info import device_line, versions

    record = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "device": device_line(),
        "versions": versions(packages),
        **numbers,
    }
    folder(str(Path(path).parent))
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
