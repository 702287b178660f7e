"""The README's blocks run as they stand; the quickstart's and pip's are the gate's own steps."""

import os
import re
import subprocess
import sys

import pytest
from run_programs import ROOT

BLOCKS = re.findall(
    r"^```(\w+)( quickstart)?\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S
)
PYTHON = [code for language, _, code in BLOCKS if language == "python"]
COMMANDS = [
    line
    for language, quickstart, code in BLOCKS
    if language == "bash" and not quickstart
    for line in code.splitlines()
    if not line.startswith("pip ")
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder like a fresh clone, where the blocks may write."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("assets", "configs", "pallas_kernels", "rwkv7_jax", "train.py", "eval.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "runs").mkdir()
    return folder


def run(clone, *words: str, **changes) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(
        words, cwd=clone, capture_output=True, text=True, check=False, env=environment | changes
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_there_is_a_quickstart_and_each_job_has_a_block():
    assert [quickstart for _, quickstart, _ in BLOCKS].count(" quickstart") == 1
    assert len(PYTHON) >= 3 and len(COMMANDS) >= 5


@pytest.mark.slow
def test_the_python_blocks_run_one_after_the_other(clone):
    assert run(clone, sys.executable, "-c", "\n".join(PYTHON)).strip()
    assert (clone / "runs" / "charmaps.pth").stat().st_size > 0


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(clone):
    for command in COMMANDS:
        words = command.split()
        assert words[0] in ("python", "rwkv7"), command
        start = [sys.executable, "-m", "rwkv7_jax.cli"] if words[0] == "rwkv7" else [sys.executable]
        assert run(clone, *start, *words[1:]), command
