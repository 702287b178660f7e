"""Programs of tests/support that run in a process of their own, for what they import."""

import os
import subprocess
import sys
from pathlib import Path


def run_child(name: str, *arguments: Path | str, **environment: str) -> None:
    """Runs tests/support/NAME.py to its end, which must be a good one.

    Args:
        name: of the program, without its suffix.
        *arguments: of its command line.
        **environment: variables that are added to this process's.
    """
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
