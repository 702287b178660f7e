"""Checkpoints of other people, not part of this project; tests skip where they are absent.

The environment variable RWKV7_CHECKPOINTS names their folder.
"""

import os
from pathlib import Path

import pytest
from run_programs import ROOT

# Bytes are ids, without an end of text: 12 layers of width 64.
TINY = "rwkvcpp-tiny-7v0-834k/derived-bf16.pth"

# Digits, a comma and a sign for the end: 2 layers, 4 heads of 16.
REVERSE = "blinkdl-reverse-260123/derived-official-layout.pth"


def folder() -> Path:
    """Returns the folder, which may be absent."""
    default = Path(ROOT).parent / "shared" / "checkpoints"
    return Path(os.environ.get("RWKV7_CHECKPOINTS", default))


def genuine(name: str) -> Path:
    """Returns the path of one of these files; skips the test where it is absent."""
    path = folder() / name
    if not path.exists():
        pytest.skip(f"{name} is not there (RWKV7_CHECKPOINTS names its folder)")
    return path
