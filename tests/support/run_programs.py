"""Runs train.py for tests, as a program of its own or inside this process."""

import contextlib
import functools
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv7_jax.runs.input_pipeline import BatchSource
from rwkv7_jax.runs.process import StopSignals
from rwkv7_jax.runs.run_directory import OwnedRunDirectory
from rwkv7_jax.runs.settings import Settings

ROOT = Path(__file__).parents[2]
# A model of one layer on a task, so that little besides the machinery takes time.
MODEL = {
    "vocab_size": 257,
    "num_layers": 1,
    "width": 16,
    "head_size": 16,
    "ffn_width": 16,
}
MODEL |= {"decay_rank": 2, "icl_rank": 2, "value_rank": 2, "gate_rank": 2}
SMALLEST = {
    **{f"model.{name}": size for name, size in MODEL.items()},
    "data.path": "task:mapping",
    "data.length": 24,
    "data.batch_size": 2,
    "evaluation.windows": 2,
    "evaluation.length": 24,
    "optimizer.schedule": "constant",
    "log_every": 1,
}


def arguments(workdir: Path, config: str, **settings) -> list[str]:
    """Makes the command line of a run; dots in the names of settings may be `__`."""
    named = {name.replace("__", "."): value for name, value in settings.items()}
    flags = [f"--config.{name}={value}" for name, value in named.items()]
    return ["train.py", f"--config=configs/{config}.py", f"--workdir={workdir}", *flags]


def program(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a program to its end."""
    return subprocess.run(
        [sys.executable, name, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MPLBACKEND": "agg"},
    )


def start(
    workdir: Path,
    config: str = "pretrain_toy",
    *,
    extra=(),
    child=(),
    environment=(),
    **settings,
):
    """Starts the program; `child` runs in its place and gets its command line."""
    words = [sys.executable, *child, *arguments(workdir, config, **settings), *extra]
    paths = f"{ROOT}:{ROOT / 'tests' / 'support'}"
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "MPLBACKEND": "agg",
        **dict(environment),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)


def start_pair(
    workdir: Path,
    config: str = "pretrain_toy",
    *,
    others: Path | None = None,
    environment=(),
    **settings,
) -> list[subprocess.Popen]:
    """Starts two processes of one run, of one device each.

    Args:
        workdir: of the run.
        config: the name of its config.
        others: the folder that the second process is told; None for the same.
        environment: of both, besides their devices.
        **settings: as of `start`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [f"--coordinator=localhost:{port}", "--processes=2"]
    processes = []
    for index, folder in enumerate((workdir, others or workdir)):
        process = start(
            folder,
            config,
            extra=[*words, f"--process={index}"],
            environment={**devices(1), **dict(environment)},
            **settings,
        )
        processes.append(process)
    return processes


def devices(count: int) -> dict[str, str]:
    """Makes the environment of a program with so many virtual devices."""
    flag = f"--xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}"}


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """Waits for a program, checks its exit code and gives its output and errors."""
    out, error = process.communicate(timeout=600)
    assert process.returncode == code, (
        f"exit code {process.returncode}: {error[-3000:]}"
    )
    return out, error


@contextlib.contextmanager
def ends_within(seconds: float, process: subprocess.Popen):
    """Fails unless a program takes at most these seconds of the processor until `finish` inside.

    By the clock it may take six times as long, since other programs run; a program that only waits
    fails by that.
    """
    began = time.monotonic()
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()
    # User and system time; those of its children are added to theirs as soon as it is waited for.
    already = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    before = _seconds_of_children()
    yield
    waited = time.monotonic() - began
    taken = _seconds_of_children() - before - already
    assert taken < seconds, f"The program took {taken:.1f} s of the processor to end."
    assert waited < 6 * seconds, f"The program ended after {waited:.1f} s."


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def last_line(error: str) -> str:
    """Returns the last line of the errors: why the program ended."""
    return [line for line in error.splitlines() if line.strip()][-1]


@functools.cache
def load_program(name: str) -> dict:
    """Returns what a program defines; the program itself does not run."""
    # Once: its flags can be defined only once.
    return runpy.run_path(str(ROOT / name), run_name=f"{Path(name).stem}_program")


def load_train() -> dict:
    """Returns what train.py defines."""
    return load_program("train.py")


def train_here(settings: Settings, workdir: Path) -> None:
    """Runs train.py's functions in this process."""
    with StopSignals() as stop, OwnedRunDirectory(workdir, settings) as folder:
        load_train()["train"](folder, stop)


@contextlib.contextmanager
def stopping_at(step: int):
    """Sends SIGTERM to this process, in the block, while a run makes the batch of a step."""
    original = BatchSource.__call__

    def call(pipeline, steps_done, params):
        if steps_done == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(pipeline, steps_done, params)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(BatchSource, "__call__", call)
        yield
