"""Memory-mapped files cost no memory beyond the arrays made from them."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkv7_jax.checkpoints.pth import open_pth, write_pth
from rwkv7_jax.checkpoints.tensor_files import read_safetensors, write_safetensors

MIB = 2**20


def resident_bytes(path):
    """Return how many bytes of a mapped file are resident in this process."""
    text = Path("/proc/self/smaps").read_text()
    found = re.findall(rf"{re.escape(str(path))}\n.*\n.*\n.*\nRss: +(\d+) kB", text)
    assert found, text[:500]
    return 1024 * sum(map(int, found))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
@pytest.mark.parametrize(
    ("name", "write", "read"),
    [
        ("m.pth", write_pth, open_pth),
        ("m.safetensors", write_safetensors, read_safetensors),
    ],
)
def test_a_verified_file_does_not_stay_resident(tmp_path, name, write, read):
    path = tmp_path / name
    array = np.random.default_rng(0).normal(size=(2, MIB)).astype(np.float32)
    write(path, [("a", array[0]), ("b", array[1])])
    opened = read(path, verify=True)
    assert resident_bytes(path) < MIB
    assert opened is not None
