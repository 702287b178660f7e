"""All measurements that need an NVIDIA GPU, in three calls of nine minutes.

    python -m benchmarks.device_run --call 1 --out FILE    # correctness
    python -m benchmarks.device_run --call 2 --out FILE    # speed of the op
    python -m benchmarks.device_run --call 3 --out FILE    # training, decoding and prompts
    python -m benchmarks.device_run --rehearse [--out FILE]

Each step runs in its own processes with a time limit. Each result is one line of JSON, written at
once: a crash, an illegal access or a full memory loses only that process, and its earlier results
stay. First all checks of a call run in parallel, together with jobs that compile the programs of
the later measurements into JAX's cache. Lines of these jobs say "warm"; their times do not count.
Then the measurements run one at a time, the most valuable first. A measurement for which no time is
left is recorded as skipped. Lines of earlier calls in FILE are kept.

`--rehearse` runs all steps on a CPU, each in one process, at tiny sizes and with the kernels in
Pallas's interpreter, to test the program before a GPU is paid for. Its times mean nothing. It exits
with 1 if a step fails.
"""

import argparse
import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Step(NamedTuple):
    """A step of a call, run in a separate process.

    Attributes:
        name: as `python -m benchmarks.device` takes it.
        call: the call that it belongs to.
        workers: processes that share its checks or, where it measures, compile its programs.
        seconds: the time limit of the process that then measures alone; 0 if nothing is measured.
    """

    name: str
    call: int
    workers: int
    seconds: int = 0


STEPS = (
    Step("laws", 1, 6),
    Step("repetitions", 1, 8),
    Step("sanitizer", 1, 2),
    Step("suite", 1, 4),
    Step("card", 1, 0, 60),
    Step("large", 1, 0, 100),
    Step("times", 2, 3, 150),
    Step("tiles", 2, 4, 50),
    Step("segments", 2, 3, 40),
    Step("float32", 2, 1, 30),
    Step("errors", 2, 1),
    Step("training", 3, 5, 140),
    Step("decoding", 3, 6, 80),
    Step("prefill", 3, 3, 50),
)
CALL_SECONDS = 9 * 60
# Processes that run at once: more would fill a GPU's memory (16 did) or wait for cores.
AT_ONCE = min(12, os.cpu_count() or 1)
# What a process of a step can come to.
WORST = ("ok", "failed", "time limit")
# The share of a call's time that is at least left to all that runs at once.
TOGETHER = 0.5
# What a step must have left to be worth a start.
LEAST_SECONDS = 15
REHEARSAL_SECONDS = 300


def card() -> str:
    """Names the GPU of this machine, or "cpu"; without loading JAX, which would hold its memory."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "cpu"
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return (done.stdout.strip().splitlines() or ["cpu"])[0]


class Record:
    """The file of results, to which every line is written at once."""

    def __init__(self, path: Path, **common):
        """Writes nothing yet.

        Args:
            path: of the file, which may have lines already.
            **common: what every line says.
        """
        self._path = path
        self._common = common
        self._lock = threading.Lock()

    def write(self, step: str, row: dict) -> None:
        """Writes a line and shows it."""
        line = json.dumps({"step": step, **self._common, **row})
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
            print(line, flush=True)


def commands_of(
    step: Step, *, rehearse: bool
) -> tuple[list[list[str]], list[str] | None]:
    """Returns the commands of a step: those that run in parallel, and the one that runs alone.

    Returns:
        Commands of the workers, and the measuring command, None if nothing is measured. In a
        rehearsal one process does all work of a step.
    """
    alone = [sys.executable, "-m", "benchmarks.device", step.name]
    if rehearse:
        return [], [*alone, "--rehearse"]
    workers = []
    for part in range(step.workers):
        worker = [*alone, "--part", str(part), str(step.workers)]
        workers.append([*worker, "--warm"] if step.seconds else worker)
    return workers, alone if step.seconds else None


def run_together(
    commands: dict[str, list[list[str]]], record: Record, end: float
) -> dict[str, str]:
    """Runs the workers of steps, `AT_ONCE` at once; returns the worst statuses.

    Args:
        commands: of the workers, by the step's name.
        record: where their lines go.
        end: when all must have ended, by `time.monotonic`.
    """

    def run(name: str, command: list[str]) -> str:
        return run_process(name, command, record, max(0.0, end - time.monotonic()))

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
        running = []
        for name, workers in commands.items():
            running += [(name, threads.submit(run, name, worker)) for worker in workers]
    statuses: dict[str, str] = {}
    for name, future in running:
        statuses[name] = max(statuses.get(name, "ok"), future.result(), key=WORST.index)
    return statuses


def run_process(name: str, command: list[str], record: Record, seconds: float) -> str:
    """Runs a process of a step, writes its lines, and returns one of `WORST`.

    Args:
        name: of the step.
        command: what to run.
        record: where its lines go.
        seconds: its time limit.
    """
    began = time.monotonic()
    is_late = threading.Event()
    errors: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The children of a step, and parallel steps, need memory of the GPU too.
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        start_new_session=True,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None

        def stop() -> None:
            is_late.set()
            # With its children, which hold the GPU as well.
            os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, stop)
        timer.start()
        # Read apart, or a child with much to say there would wait for ever.
        reader = threading.Thread(target=errors.extend, args=(child.stderr,))
        reader.start()
        common = {"warm": True} if "--warm" in command else {}
        failures = _copy_lines(child.stdout, name, record, common)
        code = child.wait()
        timer.cancel()
        reader.join()
    status = "failed" if code or failures else "ok"
    row: dict = common | {"status": "time limit" if is_late.is_set() else status}
    row["seconds"] = round(time.monotonic() - began, 1)
    if code and not is_late.is_set():
        row["exit code"] = code
        row["error"] = "".join(errors[-20:])[-2000:]
    record.write(name, row)
    return row["status"]


def _copy_lines(lines: Iterable[str], name: str, record: Record, common: dict) -> int:
    """Writes the lines of a process as they come, and counts those that report a failure."""
    failures = 0
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        # Compilers and libraries print other lines.
        if not isinstance(row, dict):
            print(line, end="", file=sys.stderr)
            continue
        failures += str(row.get("result", "")).startswith("failed")
        record.write(name, common | row)
    return failures


def run_steps(
    steps: list[Step], record: Record, *, total_seconds: float, rehearse: bool
) -> dict[str, str]:
    """Runs steps until the time is over; returns the status of each."""
    began = time.monotonic()
    end = began + total_seconds
    together = {}
    alone = {}
    for step in steps:
        together[step.name], alone[step] = commands_of(step, rehearse=rehearse)
    measured = sum(step.seconds for step in steps)
    first = max(TOGETHER * total_seconds, total_seconds - measured)
    statuses = run_together(together, record, began + first)
    for step, command in alone.items():
        if command is None:
            continue
        limit = REHEARSAL_SECONDS if rehearse else step.seconds
        seconds = min(limit, end - time.monotonic())
        if seconds < LEAST_SECONDS:
            statuses[step.name] = "skipped"
            record.write(step.name, {"status": "skipped"})
            continue
        statuses[step.name] = run_process(step.name, command, record, seconds)
    return {step.name: statuses[step.name] for step in steps}


def main(arguments: list[str] | None = None) -> None:
    """Runs one call, some named steps, or a rehearsal of all.

    Raises:
        SystemExit: wrong arguments, no GPU, or a step of a rehearsal that is not "ok".
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_run")
    parser.add_argument("--call", type=int, choices=(1, 2, 3))
    names = [step.name for step in STEPS]
    parser.add_argument("--steps", nargs="+", choices=names, metavar="STEP")
    parser.add_argument(
        "--rehearse", action="store_true", help="run tiny sizes on a CPU"
    )
    parser.add_argument("--out", type=Path, default=Path("device.jsonl"))
    parser.add_argument(
        "--seconds", type=float, help="time limit of all steps together"
    )
    flags = parser.parse_args(arguments)
    if not (flags.call or flags.steps or flags.rehearse):
        parser.error("name a --call, --steps, or --rehearse")
    name = card()
    if name == "cpu" and not flags.rehearse:
        raise SystemExit("device_run: there is no NVIDIA GPU here; use --rehearse.")
    wanted = flags.steps or names
    steps = [
        step
        for step in STEPS
        if step.name in wanted and flags.call in (None, step.call)
    ]
    budget = REHEARSAL_SECONDS if flags.rehearse else CALL_SECONDS
    if flags.rehearse:
        os.environ["JAX_PLATFORMS"] = "cpu"
    record = Record(flags.out, card=name, call=flags.call, rehearsal=flags.rehearse)
    statuses = run_steps(
        steps,
        record,
        total_seconds=flags.seconds or budget,
        rehearse=flags.rehearse,
    )
    print("  ".join(f"{name}: {status}" for name, status in statuses.items()))
    if flags.rehearse and set(statuses.values()) != {"ok"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
