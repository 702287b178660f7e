"""The memory and time of loading a checkpoint, next to reading the bytes and next to torch.

Run from the repository's root: `python -m benchmarks.load_checkpoint [--json FILE]`. The file has
the shapes of a 0.4B model (0.9 GB of bfloat16) and random numbers, and is in the page cache. Each
peak is that of a separate process, mapped pages included. Linux only: memory is read from /proc.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks import record
from rwkv7_jax.checkpoints import tensor_names as names
from rwkv7_jax.checkpoints.pth import write_pth
from rwkv7_jax.model.config import RWKV7Config

_ENDING = """
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("RESULT", seconds, int(peak.split()[1]) * 1024)
"""
# Each program gets the path as its only argument. Imports and JAX's start are not in the seconds.
PROGRAMS = {
    "load_model": """
import sys, time, jax
jax.devices()
from rwkv7_jax.checkpoints.model_files import load_model
began = time.perf_counter()
jax.block_until_ready(load_model(sys.argv[1])[0])
seconds = time.perf_counter() - began
""",
    "read the bytes": """
import sys, time
block = bytearray(1 << 22)
began = time.perf_counter()
with open(sys.argv[1], "rb", buffering=0) as file:
    while file.readinto(block):
        pass
seconds = time.perf_counter() - began
""",
    "torch.load, mapped, cloned": """
import sys, time, torch
began = time.perf_counter()
found = torch.load(sys.argv[1], weights_only=True, mmap=True)
found = {name: tensor.clone() for name, tensor in found.items()}
seconds = time.perf_counter() - began
""",
    "imports alone": """
import jax, rwkv7_jax.checkpoints.model_files
jax.devices()
seconds = 0.0
""",
}


def random_tensors(config: RWKV7Config) -> Iterator[tuple[str, np.ndarray]]:
    """Makes every tensor of a model by official name, one at a time."""
    random = np.random.default_rng(0)
    for name, shape in names.accepted_shapes(config).items():
        numbers = 0.02 * random.standard_normal(shape, np.float32)
        tensor = numbers.astype(ml_dtypes.bfloat16)
        yield name, tensor.reshape(names.file_shape(name, shape))


def measure(program: str, path: Path) -> tuple[float, int]:
    """Measures seconds and peak bytes of one program in a separate process."""
    done = subprocess.run(
        [sys.executable, "-c", program + _ENDING, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")},
    )
    result = next(
        line for line in done.stdout.splitlines() if line.startswith("RESULT")
    )
    _, seconds, peak = result.split()
    return float(seconds), int(peak)


def table(path: Path, repeats: int) -> list[dict]:
    """Measures each program: median seconds, GB/s, and the highest peak as a share of the file."""
    size = path.stat().st_size
    rows = []
    for name, program in PROGRAMS.items():
        if "torch" in name and not importlib.util.find_spec("torch"):
            continue
        runs = [measure(program, path) for _ in range(repeats)]
        seconds = statistics.median(run[0] for run in runs)
        peak = max(run[1] for run in runs)
        speed = size / seconds / 1e9 if seconds else 0.0
        rows.append(
            {
                "what": name,
                "seconds": seconds,
                "GB/s": speed,
                "peak_to_file": peak / size,
            }
        )
    return rows


def main() -> None:
    """Prints the table; with `--json`, writes it with device, versions, date and command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", help="folder for the temporary file")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    config = RWKV7Config.preset("0.4b", num_layers=args.layers)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        path = Path(folder) / "model.pth"
        write_pth(path, random_tensors(config))
        size = path.stat().st_size
        rows = table(path, args.repeats)
    print(
        f"file of {size / 1e9:.2f} GB\n{'':<28}{'seconds':>9}{'GB/s':>8}{'peak / file':>13}"
    )
    for row in rows:
        figures = (
            f"{row['seconds']:>9.2f}{row['GB/s']:>8.2f}{row['peak_to_file']:>13.2f}"
        )
        print(f"{row['what']:<28}{figures}")
    if args.json:
        record.write(
            args.json,
            "benchmarks.load_checkpoint",
            file_bytes=size,
            rows=rows,
        )


if __name__ == "__main__":
    main()
