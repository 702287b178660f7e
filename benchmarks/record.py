"""The result file of a benchmark: date, command, device, versions and the numbers."""

import datetime
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def folder(path: str) -> Path:
    """Makes a folder for results, before the work for them begins; for `argparse`."""
    made = Path(path)
    made.mkdir(parents=True, exist_ok=True)
    return made


def require_rows_kept(path: str | None, place: str, rows: Iterable[str]) -> None:
    """Ends the program where a result file has rows that a new one would lose.

    A part of a table, or one made of a cache that lacks cells, must not replace all of it.

    Args:
        path: of the file; None where nothing is written.
        place: the key under which the file has its rows by name.
        rows: those that are about to be written.

    Raises:
        SystemExit: it has; the message names some of them, and the file is left as it is.
    """
    if not path or not Path(path).exists():
        return
    before = json.loads(Path(path).read_text(encoding="utf-8"))
    kept = set(rows)
    lost = [row for row in before.get(place, {}) if row not in kept]
    if lost:
        some = ", ".join(f'"{row}"' for row in lost[:3])
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise SystemExit(
            f"`{path}` has rows that this run does not produce, so it is unchanged: {some}{more} "
            f'of "{place}". Name another file.'
        )


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
