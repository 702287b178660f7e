"""The method on toy tasks: four ways to tune a frozen model, and the gain of each.

    python -m benchmarks.paper_table --quick      # the gate: a few minutes on two CPU cores
    python -m benchmarks.paper_table --json benchmarks/results/cpu-paper-table.json \
        --pictures benchmarks/results

Rows are an untuned small model, an untuned large model, a large model with instructions or
examples, and the small model's state tuned in each way. Columns are tasks that the models were not
trained for. `benchmarks.laws` and `benchmarks.experiments` follow, each with its target. Every cell
is cached as soon as it is complete, so an interrupted run can resume; a change of the code or of
the models starts a new cache. The exit code is 1 if a target is missed.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from benchmarks import experiments, laws, record
from benchmarks.lab import DBP, RAW, STANDARD, WHITENED, base, measure, tune
from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.reports import plots as pictures
from rwkv7_jax.runs.monitoring.progress_bar import ProgressBar
from rwkv7_jax.test_time.grpo import grpo
from rwkv7_jax.test_time.rollouts import RolloutSampler

TASKS = ("steer", "novel", "modulus-9", "product-7", "facts-256")
METHODS = {
    "standard state": STANDARD,
    "upscaled, raw features": RAW,
    "upscaled, whitened": WHITENED,
    "upscaled, DBP": DBP,
}
EXPERIMENTS = {
    "E1 identity": laws.identity,
    "E2 linearity": laws.linearity,
    "E4 reparametrisation": laws.reparametrisation,
    "E6 steering": experiments.steering,
    "E7 novel functions": experiments.novel_functions,
    "E8 conditioning": experiments.conditioning,
    "E8b conditioning, other seeds": experiments.conditioning_again,
    "E9 capacity": lambda: experiments.capacity(seeds=3),
    "E9b capacity curve": experiments.capacity_curve,
    "E10 rewards": experiments.policy,
    "E11 guidance": experiments.guidance,
    "E12 observer": experiments.observing,
    "E12 observer, states alone": lambda: (
        experiments.observing(answers=0.0) | {"passed": None}
    ),
    "E13 retention": experiments.retention,
    "E14 forgetting": experiments.forgetting,
    "E15 serving": laws.serving,
}
QUICK = ("E1", "E2", "E4", "E6", "E8", "E9", "E10", "E11", "E13", "E14", "E15")
# In the gate: only the runs that their targets need.
FEWER_RUNS = {
    "E8 conditioning": lambda: experiments.conditioning(all_rules=False),
    "E9 capacity": experiments.capacity,
}
# What the picture of E8 calls the curves.
CURVES = {
    "adam": "Adam",
    "dbp": "DBP, our rule",
    "whitened": "Adam, whitened features",
    "dbp, one iteration": "DBP, our rule, one iteration",
    "dbp, as published": "DBP, as published",
}
# The files that results depend on.
DEPENDENCIES = (
    "rwkv7_jax/**/*.py",
    "pallas_kernels/**/*.py",
    "benchmarks/*.py",
    "assets/*.pth",
)


def fingerprint(dependencies: tuple[str, ...]) -> str:
    """Hashes the code and the models that results depend on, given as patterns of paths."""
    root = Path(__file__).parent.parent
    digest = hashlib.blake2b(digest_size=8)
    for pattern in dependencies:
        for path in sorted(root.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


class Cells:
    """A cache of results by name, in a file that is rewritten after each."""

    def __init__(self, folder: Path, dependencies: tuple[str, ...] = DEPENDENCIES):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"cells-{fingerprint(dependencies)}.json"
        self.results = json.loads(self.path.read_text()) if self.path.exists() else {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns a result and the seconds it took; computes it if it is not cached."""
        if name not in self.results:
            began = time.monotonic()
            found = make()
            seconds = round(time.monotonic() - began, 1)
            self.results[name] = {"found": found, "seconds": seconds}
            with atomic_write(self.path) as file:
                file.write(json.dumps(self.results).encode())
        return self.results[name]


def informed(task: str, seed: int) -> float:
    """Measures the large model with the instruction, or after half a row of examples."""
    if task == "steer":
        return measure("reverse", name="large", seed=seed).accuracy
    by_position = measure(
        task,
        name="large",
        seed=seed,
        length=64,
    ).by_position
    shares = by_position[~np.isnan(by_position)]
    return float(shares[len(shares) // 2 :].mean())


def rewarded(task: str, seed: int) -> float | None:
    """Tunes the small model by rewards of exact answers; None where questions have no answer."""
    if task.startswith("facts"):
        return None
    reward = experiments.Exact(task, seed)
    # Some prompts, only to see how long an answer is.
    reward.prompts(0)
    tokens = len(next(iter(reward.answers.values())))
    made = grpo(
        RolloutSampler(*base("small"), group=8, tokens=tokens),
        reward.prompts,
        reward,
        key=jax.random.key(seed),
        stop_reward=2.0,
    )
    return measure(task, made.state, seed=seed).accuracy


def tuned(task: str, method, seed: int) -> float:
    """Measures the small model from a tuned state."""
    return measure(task, tune(task, method, seed=seed).state, seed=seed).accuracy


def rows() -> dict[str, Callable[[str, int], float | None]]:
    """Returns the functions that compute the table's rows from a task and a seed."""
    made: dict[str, Callable] = {
        "small, as it is": lambda task, seed: measure(task, seed=seed).accuracy,
        "large, as it is": lambda task, seed: (
            measure(task, name="large", seed=seed).accuracy
        ),
        "large, told or shown": informed,
    }
    for label, method in METHODS.items():
        made[label] = lambda task, seed, method=method: tuned(task, method, seed)
    return made | {"test time, rewards": rewarded}


def table(cells: Cells, seeds: int, bar: ProgressBar) -> dict[str, dict[str, list]]:
    """Computes accuracies by row and task, one for each seed."""
    found: dict[str, dict[str, list]] = {}
    done = 0
    for label, make in rows().items():
        for task in TASKS:
            for seed in range(seeds):
                name = f"{label} | {task} | {seed}"
                cell = cells.get(name, lambda m=make, t=task, s=seed: m(t, s))
                found.setdefault(label, {}).setdefault(task, []).append(cell["found"])
                done += 1
                bar.update(done, f"{label}, {task}: {cell['seconds']} s")
    return found


def show(found: dict[str, dict[str, list]]) -> str:
    """Formats the table: means, and half the range over seeds."""
    lines = ["".join([f"{'':26}", *(f"{task:>16}" for task in TASKS)])]
    for label, by_task in found.items():
        line = f"{label:26}"
        for task in TASKS:
            values = [value for value in by_task[task] if value is not None]
            spread = (max(values) - min(values)) / 2 if values else 0.0
            line += (
                f"{np.mean(values):>9.3f} +-{spread:.3f}" if values else f"{'-':>16}"
            )
        lines.append(line)
    return "\n".join(lines)


def draw(folder: Path, found: dict[str, Any]) -> None:
    """Draws the loss with and without DBP, the capacity, and the forgetting.

    Args:
        folder: of the pictures; it is made.
        found: the numbers of the experiments by name; those that are missing are not drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    losses = found.get("E8 conditioning", {}).get("losses")
    if losses:
        lines = {
            CURVES[name]: [(step + 1, value) for step, value in enumerate(curve)]
            for name, curve in losses.items()
        }
        pictures.curves(
            folder / "conditioning.png",
            lines,
            x="step",
            y="loss (nats), 128 facts",
        )
    points = found.get("E9b capacity curve", {}).get("points")
    if points:
        lines = {
            label: [
                (point["numbers"], max(point["facts"].values()))
                for name, point in points.items()
                if name.startswith(letter)
            ]
            for letter, label in {"N": "start state", "M": "upscaled, DBP"}.items()
        }
        pictures.curves(
            folder / "capacity.png",
            lines,
            x="tuned parameters",
            y="facts stored in 300 steps",
        )
    blocks = found.get("E14 forgetting", {}).get("by_eight_facts")
    if blocks:
        labels = {
            "standard": "start state",
            "static": "upscaled state, static memory",
        }
        lines = {
            labels[name]: [(8 * i + 4, share) for i, share in enumerate(shares)]
            for name, shares in blocks.items()
        }
        pictures.curves(
            folder / "forgetting.png",
            lines,
            x="number of the fact in its row (means of eight)",
            y="accuracy",
        )


def verdicts(
    cells: Cells, chosen: dict[str, Callable[[], Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Runs experiments and prints a line each; returns their numbers and the missed ones."""
    report = {}
    missed = []
    for name, experiment in chosen.items():
        cell = cells.get(name, experiment)
        shown = {key: value for key, value in cell["found"].items() if key != "losses"}
        passed = shown.pop("passed")
        if passed is False:
            missed.append(name)
        verdict = {True: "met", False: "MISSED", None: "no target"}[passed]
        head = f"{name:28}{verdict:8}{cell['seconds']:>6} s"
        print(f"{head}  {json.dumps(rounded(shown))}", flush=True)
        report[name] = cell["found"] | {"seconds": cell["seconds"]}
    return report, missed


def carried_over(path: Path) -> dict[str, Any]:
    """Reads the results of an earlier run; adds its date to each row without one."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    rows = {name: before[name] for name in ("table", *EXPERIMENTS) if name in before}
    return {name: {"date": before["date"], **row} for name, row in rows.items()}


def read_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="only the experiments of the gate"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", default="", help="only experiments whose names contain this text"
    )
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--pictures", type=record.folder, help="folder for figures")
    parser.add_argument(
        "--cells", default="runs/table", help="folder of the results' cache"
    )
    return parser.parse_args()


def chosen_experiments(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Returns the experiments that the options leave, by name."""
    known = EXPERIMENTS | FEWER_RUNS if options.quick else EXPERIMENTS
    chosen = {}
    for name, experiment in known.items():
        in_gate = name.split()[0] in QUICK
        if options.only in name and (in_gate or not options.quick):
            chosen[name] = experiment
    return chosen


def main() -> int:
    """Runs the table and the experiments, prints them, and writes files where asked."""
    options = read_options()
    began = time.monotonic()
    quick = options.quick
    cells = Cells(Path(options.cells) / ("quick" if quick else "full"))
    report: dict[str, Any] = {}
    if not quick and not options.only:
        bar = ProgressBar(len(rows()) * len(TASKS) * options.seeds, "table")
        report["table"] = table(cells, options.seeds, bar)
        bar.close()
        print(show(report["table"]))
    more, missed = verdicts(cells, chosen_experiments(options))
    bars = sum(one["passed"] is not None for one in more.values())
    print(
        f"{bars - len(missed)} of {bars} targets met, {time.monotonic() - began:.0f} s"
    )
    if options.pictures:
        draw(options.pictures, more)
    if options.json:
        # Of a part, as of the gate alone, the other rows of the file stay as they were.
        before = carried_over(Path(options.json))
        packages = ("jax", "flax", "optax", "numpy")
        record.write(
            options.json,
            "benchmarks.paper_table",
            packages=packages,
            **before | report | more,
        )
    return 1 if missed else 0


def rounded(found: Any) -> Any:
    """Rounds numbers to four digits."""
    if isinstance(found, dict):
        return {str(key): rounded(value) for key, value in found.items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return float(f"{found:.4g}") if isinstance(found, float) else found


if __name__ == "__main__":
    sys.exit(main())
