"""What every result file says: date, command, device, versions, and the numbers."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any


def write(path: str, module: str, *, packages: tuple[str, ...] = ("jax",), **numbers: Any) -> None:
    """One run's numbers as JSON.

    Args:
        path: the file.
        module: the benchmark's, as `python -m` takes it.
        packages: whose versions matter.
        **numbers: what was found.
    """
    import jax

    device = jax.devices()[0].device_kind
    record = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "device": f"{device}, {platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        **numbers,
    }
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
