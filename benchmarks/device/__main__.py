"""Runs one step of `benchmarks.device_run`: `python -m benchmarks.device STEP`.

A step prints one line of JSON for each result as soon as it has it. "result" is "ok", or says what
failed or is not installed. A kernel that returns wrong or varying numbers has failed.
"""

import argparse
import json
from collections.abc import Callable

from benchmarks.device import correctness, speed
from benchmarks.device.sizes import DEVICE, REHEARSAL, Rows, Sizes

STEPS: dict[str, Callable[[Sizes], Rows]] = {
    "card": correctness.card,
    "laws": correctness.laws,
    "repetitions": correctness.repetitions,
    "large": correctness.large,
    "sanitizer": correctness.sanitizer,
    "small": correctness.small,
    "times": speed.times,
    "tiles": correctness.neighbouring_tiles,
    "segments": speed.segments,
    "float32": speed.float32,
    "training": speed.training,
    "decoding": speed.decoding,
    "prefill": speed.prefill,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one step and prints its results, one line of JSON each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device")
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--rehearse", action="store_true")
    flags = parser.parse_args(arguments)
    for row in STEPS[flags.step](REHEARSAL if flags.rehearse else DEVICE):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
