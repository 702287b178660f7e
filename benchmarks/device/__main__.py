"""Runs one step of `benchmarks.device_run`: `python -m benchmarks.device STEP`.

A step prints one line of JSON per result, as soon as it is available. "result" is "ok", or names
what failed or is not installed. A kernel that returns wrong or varying numbers counts as failed.
"""

import argparse
import json
from collections.abc import Callable
from unittest import mock

from benchmarks.device import correctness, decoding, speed, training
from benchmarks.device.sizes import DEVICE, REHEARSAL, Job, Jobs, Sizes, attempt
from pallas_kernels import bench
from rwkv7_jax.runs import enable_compilation_cache, user_folder

STEPS: dict[str, Callable[[Sizes], Jobs]] = {
    "card": correctness.card,
    "laws": correctness.laws,
    "repetitions": correctness.repetitions,
    "large": correctness.large,
    "sanitizer": correctness.sanitizer,
    "small": correctness.small,
    "suite": correctness.suite,
    "errors": speed.errors,
    "times": speed.times,
    "tiles": speed.neighbouring_tiles,
    "segments": speed.segments,
    "float32": speed.float32,
    "training": training.steps,
    "decoding": decoding.generated,
    "prefill": decoding.prompts,
}


def share(jobs: Jobs, part: int, parts: int) -> list[Job]:
    """Returns one part of a step's jobs: neighbours, which share data, stay together."""
    every = list(jobs)
    return every[part * len(every) // parts : (part + 1) * len(every) // parts]


def main(arguments: list[str] | None = None) -> None:
    """Runs one step, or a part of it, and prints its results, one line of JSON each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device")
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--warm", action="store_true", help="compile for a later run")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar="N")
    parser.add_argument(
        "--only", action="append", help="jobs whose labels, as JSON, contain this text"
    )
    flags = parser.parse_args(arguments)
    # Programs that one process has compiled are another one's.
    enable_compilation_cache(user_folder())
    sizes = REHEARSAL if flags.rehearse else DEVICE
    if flags.warm:
        sizes = sizes._replace(warm=True, repeats=1)
        # Times of programs that run next to others say nothing: one call each is enough.
        mock.patch.object(bench, "RUN_SECONDS", 0.0).start()
    for job in share(STEPS[flags.step](sizes), *flags.part):
        labels = json.dumps(job.labels)
        if flags.only and not any(text in labels for text in flags.only):
            continue
        print(json.dumps(job.labels | attempt(job.run)), flush=True)


if __name__ == "__main__":
    main()
