"""What train.py's loop costs beside the bare jitted steps: logs, batches, signals, checks for NaN.

Run from the repository's root: `python -m benchmarks.loop_overhead [--json FILE]`. Both ways make
the same updates of the small toy model, about 50 ms each, and take turns. Processor time is of all
threads, and hardly depends on what else the machine does; the loop's own is of its main thread.
"""

import argparse
import runpy
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax

from benchmarks import record
from rwkv7_jax.runs import compilation_cache as compile_cache
from rwkv7_jax.runs.input_pipeline import InputPipeline
from rwkv7_jax.runs.process import StopSignals
from rwkv7_jax.runs.run_directory import OwnedRunDirectory
from rwkv7_jax.runs.settings import Settings, read_settings
from rwkv7_jax.training.train_step import TrainState, make_train_step

WARM = 10


class Mark(NamedTuple):
    """Clocks at one moment, or between two, in seconds."""

    wall: float
    processor: float
    thread: float

    @classmethod
    def now(cls) -> "Mark":
        return cls(time.perf_counter(), time.process_time(), time.thread_time())

    def per_step(self, end: "Mark", steps: int) -> "Mark":
        return Mark(*((b - a) / steps for a, b in zip(self, end, strict=True)))


def settings_of(steps: int) -> Settings:
    """The small toy model of configs/pretrain_toy.py, logged every tenth step."""
    config = runpy.run_path("configs/pretrain_toy.py")["get_config"]("small").to_dict()
    config |= {"steps": steps + WARM, "log_every": 10, "save_every": 0}
    config["data"] |= {"batch_size": 16}
    config["evaluation"] |= {"every": 0, "windows": 2, "retention": ""}
    return read_settings(config)


def in_loop(program: dict, settings: Settings) -> Mark:
    """A step's clocks inside train.py's loop: marks are set where it asks for batches."""
    marks, asked = [], InputPipeline.__call__

    def ask(feed, step, params):
        marks.append(Mark.now())
        return asked(feed, step, params)

    InputPipeline.__call__ = ask
    try:
        with tempfile.TemporaryDirectory() as folder:
            with StopSignals() as stop, OwnedRunDirectory(folder, settings) as place:
                program["train"](settings, place, stop)
    finally:
        InputPipeline.__call__ = asked
    return marks[WARM - 1].per_step(marks[-1], len(marks) - WARM)


def bare(program: dict, settings: Settings) -> Mark:
    """A step's clocks with nothing around it: one batch that is on the device already."""
    with tempfile.TemporaryDirectory() as folder, OwnedRunDirectory(folder, settings) as place:
        run = program["set_up"](settings, place)
    step = make_train_step(run.mode.loss, run.tx)
    feed = InputPipeline(run.mode.batches(0, None))
    batch = feed(0, None).device
    feed.close()
    state = TrainState.create(run.mode.init_params(), run.tx)
    state = jax.device_put(state, jax.local_devices()[0])
    for number in range(settings.steps):
        if number == WARM:
            jax.block_until_ready(state)
            began = Mark.now()
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    return began.per_step(Mark.now(), settings.steps - WARM)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    compile_cache.enable_compilation_cache(compile_cache.user_folder())
    program = runpy.run_path(str(Path("train.py").absolute()), run_name="train_program")
    settings = settings_of(options.steps)
    pairs = [(bare(program, settings), in_loop(program, settings)) for _ in range(options.rounds)]
    middle = [
        Mark(*(1000 * statistics.median(values) for values in zip(*way, strict=True)))
        for way in zip(*pairs, strict=True)
    ]
    for name, mark in zip(("bare", "loop"), middle, strict=True):
        print(
            f"{name}  {mark.wall:7.2f} ms a step, processor {mark.processor:7.2f} ms, "
            f"main thread {mark.thread:6.3f} ms"
        )
    own = middle[1].thread - middle[0].thread
    shares = {
        "processor": middle[1].processor / middle[0].processor - 1,
        "own_of_50_ms": own / 50,
        "wall": middle[1].wall / middle[0].wall - 1,
    }
    print("  ".join(f"{name} {share:+.1%}" for name, share in shares.items()))
    if options.json:
        numbers = {
            f"{name}_ms": mark._asdict()
            for name, mark in zip(("bare", "loop"), middle, strict=True)
        }
        record.write(options.json, "benchmarks.loop_overhead", **numbers, overhead=shares)


if __name__ == "__main__":
    main()
