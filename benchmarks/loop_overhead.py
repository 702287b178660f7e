"""The overhead of train.py's loop around the jitted steps: logs, batches, signals, NaN checks.

Run from the repository's root: `python -m benchmarks.loop_overhead [--json FILE]`. The loop and the
bare steps make the same updates of the small toy model, about 50 ms each, and alternate. CPU time
is summed over all threads and hardly depends on other load; the loop's own time is that of its main
thread.
"""

import argparse
import runpy
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax

from benchmarks import record
from rwkv7_jax.runs import compilation_cache as compile_cache
from rwkv7_jax.runs.input_pipeline import BatchSource
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
        """Reads the clocks."""
        return cls(time.perf_counter(), time.process_time(), time.thread_time())

    def per_step(self, end: "Mark", steps: int) -> "Mark":
        """Divides the time from here to `end` by a number of steps."""
        return Mark(
            wall=(end.wall - self.wall) / steps,
            processor=(end.processor - self.processor) / steps,
            thread=(end.thread - self.thread) / steps,
        )


def median_ms(marks: list[Mark]) -> Mark:
    """Takes the median of each clock, in milliseconds."""
    return Mark(
        wall=1000 * statistics.median(mark.wall for mark in marks),
        processor=1000 * statistics.median(mark.processor for mark in marks),
        thread=1000 * statistics.median(mark.thread for mark in marks),
    )


def settings_of(steps: int) -> Settings:
    """Reads the settings of the small toy model, logged every tenth step."""
    config = runpy.run_path("configs/pretrain_toy.py")["get_config"]("small").to_dict()
    config |= {"steps": steps + WARM, "log_every": 10, "save_every": 0}
    config["data"] |= {"batch_size": 16}
    config["evaluation"] |= {"every": 0, "windows": 2, "retention": ""}
    return read_settings(config)


def in_loop(program: dict, settings: Settings) -> Mark:
    """Measures a step inside train.py's loop: marks are set where it asks for batches."""
    marks = []
    original = BatchSource.__call__

    def ask(feed, step, params):
        marks.append(Mark.now())
        return original(feed, step, params)

    with (
        mock.patch.object(BatchSource, "__call__", ask),
        tempfile.TemporaryDirectory() as folder,
        StopSignals() as stop,
        OwnedRunDirectory(folder, settings) as place,
    ):
        program["train"](place, stop)
    return marks[WARM - 1].per_step(marks[-1], len(marks) - WARM)


def bare(program: dict, settings: Settings) -> Mark:
    """Measures a step with nothing around it: one batch that is on the device already."""
    with (
        tempfile.TemporaryDirectory() as folder,
        OwnedRunDirectory(folder, settings) as place,
    ):
        run = program["set_up"](place)
    _, tx = run.mode.optimizer()
    step = make_train_step(run.mode.loss, tx)
    feed = run.mode.batches(0, None)
    first = feed(0, run.mode.init_params)
    feed.close()
    assert first is not None
    batch = first.device
    state = TrainState.create(run.mode.init_params(), tx)
    state = jax.device_put(state, jax.local_devices()[0])
    for number in range(settings.steps):
        if number == WARM:
            jax.block_until_ready(state)
            began = Mark.now()
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    return began.per_step(Mark.now(), settings.steps - WARM)


def main() -> None:
    """Measures both ways in turns, prints the medians, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    compile_cache.enable_compilation_cache(compile_cache.user_folder())
    program = runpy.run_path(str(Path("train.py").absolute()), run_name="train_program")
    settings = settings_of(options.steps)
    bare_marks = []
    loop_marks = []
    # In turns, so that a machine that is busy for a while slows both alike.
    for _ in range(options.rounds):
        bare_marks.append(bare(program, settings))
        loop_marks.append(in_loop(program, settings))
    medians = {"bare": median_ms(bare_marks), "loop": median_ms(loop_marks)}
    for name, mark in medians.items():
        print(
            f"{name}  {mark.wall:7.2f} ms per step, CPU {mark.processor:7.2f} ms, "
            f"main thread {mark.thread:6.3f} ms"
        )
    alone = medians["bare"]
    loop = medians["loop"]
    own = loop.thread - alone.thread
    shares = {
        "processor": loop.processor / alone.processor - 1,
        "own_of_50_ms": own / 50,
        "wall": loop.wall / alone.wall - 1,
    }
    print("  ".join(f"{name} {share:+.1%}" for name, share in shares.items()))
    if options.json:
        record.write(
            options.json,
            "benchmarks.loop_overhead",
            bare_ms=alone._asdict(),
            loop_ms=loop._asdict(),
            overhead=shares,
        )


if __name__ == "__main__":
    main()
