"""Recall against state size against speed: BASED, windows, attention and RWKV-7 in one trainer.

    python -m benchmarks.recall --quick       # the gate: seven cells, about three CPU minutes
    python -m benchmarks.recall --json benchmarks/results/cpu-recall.json \
        --pictures benchmarks/results         # the table: two CPU hours
    python -m benchmarks.recall --full        # the published sizes, for a GPU

The task is multi-query associative recall (`benchmarks.mqar`). A cell is one model, rate and seed.
It is cached as soon as it is complete, so an interrupted table can resume; `--cached` makes the
table from the available cells. The first seed selects a model's rate on validation rows; lower and
higher rates are tried until it lies between two others. Further seeds use that rate. The exit code
is 1 if a rate is the lowest or highest that was tried, or if the gate misses a target.

A static upscaled memory counts as weights, so its bytes are those of the model without it.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Empty lets JAX take the GPU. Before `paper_table` is imported, which would choose the CPU.
os.environ.setdefault("JAX_PLATFORMS", "" if "--full" in sys.argv else "cpu")
# One thread, so that CPU seconds are those of the arithmetic and not of idle threads.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
)

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.contestants import TunedContestant, contestant
from benchmarks.mqar import FULL, SMALL, Setting, Trainer
from benchmarks.paper_table import Cells
from benchmarks.rates import at_edge
from benchmarks.timing import median_processor_seconds
from rwkv7_jax.based import state_bytes
from rwkv7_jax.reports import plots as pictures

# What cells depend on: not this program, which only asks for them and shows them.
DEPENDENCIES = (
    "rwkv7_jax/based/*.py",
    "rwkv7_jax/model/*.py",
    "pallas_kernels/*.py",
    "benchmarks/mqar.py",
    "benchmarks/contestants.py",
)

# Models by the colour of the pictures.
GROUPS = {
    "attention": ("attention",),
    "window": ("window-8", "window-16", "window-32"),
    "BASED": ("based-4", "based-8", "based-12", "based-16"),
    "BASED, then a window": ("hybrid-8-16",),
    "RWKV-7, one layer": ("rwkv-8-L1", "rwkv-16-L1", "rwkv-32-L1"),
    "RWKV-7, two layers": ("rwkv-8-L2", "rwkv-16-L2", "rwkv-32-L2"),
    "RWKV-7 with a memory": ("delta-8-24", "decay-8-24", "delta-16-48", "decay-16-48"),
}
# Those that tell most first: whatever is done when the time is up is a table.
FULL_NAMES = (
    "rwkv-32-L1",
    "based-16",
    "attention",
    "rwkv-64-L1",
    "based-8",
    "window-64",
    "based-24",
    "window-16",
    "rwkv-32-L2",
    "window-256",
    "rwkv-64-L2",
    "delta-32-96",
)

# Each tuned on its own frozen model: the model, its memory's features and dynamics.
TUNED = {
    "tuned-delta-16-64": ("rwkv-16-L1", 64, "delta"),
    "tuned-static-16-64": ("rwkv-16-L1", 64, "static"),
}
# The rate at which the frozen models were trained.
BASE_RATE = 0.01

# The gate's models, with the lowest and highest accuracy on 16 pairs of 64 tokens.
BARS = {
    "attention": (0.98, 1.0),
    "window-16": (0.0, 0.30),
    "based-4": (0.0, 1.0),
    "based-8": (0.93, 1.0),
    "based-16": (0.97, 1.0),
    "rwkv-16-L1": (0.80, 1.0),
    "rwkv-32-L1": (0.96, 1.0),
}
# Each of these recalls more than the one before it.
ORDERS = (("based-4", "based-8", "based-16"), ("rwkv-16-L1", "rwkv-32-L1"))
GATE_RATE = 0.01

# Rates from the lowest to the highest that a model, or a memory on a frozen one, may be given. A
# search begins with three of them.
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
TUNED_RATES = (0.001, 0.01, 0.1, 1.0, 10.0)
FIRST_TUNED_RATES = (0.01, 0.1, 1.0)

# Of validation accuracy: rates that differ by less are equal, and the middle one is taken.
EQUAL = 0.01

# Decoding: rows, tokens before it, and tokens timed.
DECODE_ROWS = 16
CONTEXTS = (64, 1024)
DECODED = 64
# Runs timed at once, so that the clock's ticks do not matter.
TIMES = 40


@functools.cache
def _trainer(name: str, setting: Setting) -> Trainer:
    """Makes the trainer of a model once, so that all its cells share one compiled program."""
    return Trainer(contestant(name, setting), setting)


def make_cell(name: str, setting: Setting, rates: tuple[float, ...], seed: int):
    """Trains and measures one model at some rates."""
    if name not in TUNED:
        return _trainer(name, setting).cell(rates, seed)
    base_name, size, dynamics = TUNED[name]
    head_size = contestant(base_name, setting).config.head_size
    weights = _frozen(base_name, setting, seed)
    tuned = TunedContestant(setting, head_size, size, dynamics, weights)
    return Trainer(tuned, setting).cell(rates, seed)


@functools.cache
def _frozen(name: str, setting: Setting, seed: int) -> Any:
    """Trains the model whose start state is tuned."""
    weights, _ = _trainer(name, setting).train((BASE_RATE,), seed)
    return jax.tree.map(lambda leaf: leaf[0], weights)


class Table:
    """The cells of one setting, made where they are not cached.

    Attributes:
        cells: the cache.
        setting: of all models.
        cached: whether missing cells stay missing.
    """

    def __init__(self, cells: Cells, setting: Setting, *, cached: bool = False):
        self.cells = cells
        self.setting = setting
        self.cached = cached

    def get(self, name: str, rate: float, seed: int) -> dict[str, Any] | None:
        """Returns a cell; None where it is not known and not to be made."""
        key = f"{name} | {rate:g} | {seed}"
        if key not in self.cells.results and self.cached:
            return None

        def make():
            print(f"{key} ...", flush=True)
            return make_cell(name, self.setting, (rate,), seed)[0]

        return self.cells.get(key, make)["found"]

    def validation(self, name: str, seed: int) -> dict[float, float]:
        """Tries rates until the best one lies between two others; gives each its validation."""
        rates = TUNED_RATES if name in TUNED else RATES
        first = FIRST_TUNED_RATES if name in TUNED else self.setting.rates
        low = rates.index(first[0])
        high = rates.index(first[-1])
        found: dict[float, float] = {}
        while True:
            for rate in rates[low : high + 1]:
                cell = self.get(name, rate, seed)
                if cell is not None:
                    found[rate] = cell["validation"]
            best = choose_rate(found) if found else None
            if best == rates[low] and low > 0:
                low -= 1
            elif best == rates[high] and high < len(rates) - 1:
                high += 1
            else:
                return found

    def row(self, name: str, seeds: Sequence[int]) -> dict[str, Any] | None:
        """Chooses a model's rate by the first seed, and collects all seeds; None without cells."""
        validation = self.validation(name, seeds[0])
        if not validation:
            return None
        rate = choose_rate(validation)
        known = {seed: self.get(name, rate, seed) for seed in seeds}
        cells = {seed: cell for seed, cell in known.items() if cell is not None}
        return {
            "rate": rate,
            "validation": {f"{one:g}": validation[one] for one in sorted(validation)},
            "at_edge": at_edge(rate, validation),
            "seeds": list(cells),
            "tests": {
                str(size): [cell["tests"][str(size)] for cell in cells.values()]
                for size in self.setting.tests
            },
            "cpu_s": round(
                statistics.mean(cell["cpu_s"] for cell in cells.values()), 1
            ),
            "steps": [cell["steps"] for cell in cells.values()],
            **sizes_of(name, self.setting),
        }


def sizes_of(name: str, setting: Setting) -> dict[str, int]:
    """Counts parameters that are trained, and bytes of state by the tokens that were read.

    Bytes are those after a row of training, and the matrix state's after the longest test as well.
    """
    if name in TUNED:
        base_name, size, dynamics = TUNED[name]
        config = contestant(base_name, setting).config
        # The memory and the strength of its writes.
        parameters = config.num_heads * (config.head_size * size + 1)
        size = 0 if dynamics == "static" else size
        weigh = functools.partial(state_bytes, config, memory_size=size)
    else:
        one = contestant(name, setting)
        shapes = jax.eval_shape(one.init, jax.random.key(0))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        weigh = one.state_bytes
    short = weigh(setting.train[-1].tokens)
    return {
        "parameters": parameters,
        "matrix_bytes": short.matrix,
        "state_bytes": short.total,
        "longest_matrix_bytes": weigh(setting.tests[-1].tokens).matrix,
    }


def choose_rate(validation: dict[float, float]) -> float:
    """Chooses the best rate; of rates that are equally good, the one nearest to the middle."""
    rates = sorted(validation)
    best = max(validation.values())
    middle = (len(rates) - 1) / 2
    good = [i for i, rate in enumerate(rates) if validation[rate] > best - EQUAL]
    return rates[min(good, key=lambda i: (abs(i - middle), i))]


def decode_speeds(
    names: Iterable[str], setting: Setting, repeats: int = 5
) -> dict[str, dict[str, float]]:
    """Measures tokens per CPU second after short and long contexts, in batches of rows.

    Weights are untrained: speed does not depend on them.
    """
    runs = {}
    for name in names:
        for tokens in CONTEXTS:
            runs[name, tokens] = _decoder(name, setting, tokens)
    found: dict[str, dict[str, float]] = {}
    for (name, tokens), seconds in median_processor_seconds(runs, repeats).items():
        rate = DECODE_ROWS * DECODED * TIMES / seconds
        found.setdefault(name, {})[str(tokens)] = float(f"{rate:.3g}")
    return found


def _decoder(name: str, setting: Setting, tokens: int):
    """Compiles greedy decoding after a context, and returns the function to time."""
    one = contestant(name, setting, context=tokens + DECODED)
    params = one.init(jax.random.key(0))
    shape = (DECODE_ROWS, tokens)
    prompt = np.random.default_rng(0).integers(0, setting.vocab_size, shape, np.int32)
    logits, state = jax.jit(one.run)(params, prompt, one.start(params, DECODE_ROWS))

    def step(carry, _):
        last, state = carry
        logits, state = one.run(params, last, state)
        return (jnp.argmax(logits, axis=-1).astype(jnp.int32), state), None

    decode = jax.jit(lambda carry: jax.lax.scan(step, carry, length=DECODED)[0])
    first = jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32)

    def run():
        for _ in range(TIMES):
            jax.block_until_ready(decode((first, state)))

    run()
    return run


def show(table: dict[str, Any], speeds: dict[str, Any], setting: Setting) -> str:
    """Formats the table; accuracies are means over seeds, with half their range."""
    head = (
        f"{'model':20}{'params':>8}{'matrix B':>9}{'state B':>8}{'rate':>7}{'seeds':>6}"
    )
    head += "".join(f"{size!s:>16}" for size in setting.tests)
    head += "".join(f"{f'tok/s @{tokens}':>12}" for tokens in CONTEXTS)
    lines = [head + f"{'CPU s':>8}"]
    for name, row in table.items():
        mark = "*" if row["at_edge"] else " "
        line = f"{name:20}{row['parameters']:>8}{row['matrix_bytes']:>9}"
        line += f"{row['state_bytes']:>8}{row['rate']:>6g}{mark}{len(row['seeds']):>6}"
        for values in row["tests"].values():
            spread = f" +-{(max(values) - min(values)) / 2:.3f}"
            # One seed has no range.
            spread = spread if len(values) > 1 else " " * 8
            line += f"{np.mean(values):>8.3f}{spread}"
        for tokens in CONTEXTS:
            speed = speeds.get(name, {}).get(str(tokens))
            line += f"{'-' if speed is None else f'{speed:.3g}':>12}"
        lines.append(line + f"{row['cpu_s']:>8.0f}")
    return "\n".join([*lines, "* the rate is at the edge of those tried, or < 3 tried"])


def draw(
    folder: Path, table: dict[str, Any], speeds: dict[str, Any], setting: Setting
) -> None:
    """Draws accuracy on the hardest rows against bytes, and decode speed against accuracy."""
    folder.mkdir(parents=True, exist_ok=True)
    hardest = str(setting.tests[-1])
    by_bytes = {}
    by_speed = {}
    for group, names in GROUPS.items():
        for name in names:
            if name not in table:
                continue
            row = table[name]
            right = statistics.mean(row["tests"][hardest])
            size = float(row["longest_matrix_bytes"])
            by_bytes.setdefault(group, []).append((size, right, name))
            if name in speeds:
                speed = speeds[name][str(CONTEXTS[-1])]
                by_speed.setdefault(group, []).append((right, speed, name))
    accuracy = f"accuracy, {setting.tests[-1].pairs} pairs of {hardest.split()[-1]}"
    pictures.scatter(
        folder / "recall-bytes.png",
        by_bytes,
        x=f"bytes of matrix state after {setting.tests[-1].tokens} tokens",
        y=accuracy,
        front=True,
    )
    if by_speed:
        pictures.scatter(
            folder / "recall-speed.png",
            by_speed,
            x=accuracy,
            y=f"tokens per CPU second after {CONTEXTS[-1]:,}",
        )


def quick(table: Table) -> list[str]:
    """Runs the gate's cells and prints a line each; returns the missed targets."""
    size = str(table.setting.train[-1])
    right = {}
    missed = []
    for name, (low, high) in BARS.items():
        cell = table.get(name, GATE_RATE, 0)
        assert cell is not None
        right[name] = cell["tests"][size]
        verdict = "met" if low <= right[name] <= high else "MISSED"
        if verdict != "met":
            missed.append(name)
        bar = f"{low:.2f} to {high:.2f}"
        print(f"{name:14}{right[name]:7.3f}  {bar}  {verdict}  {cell['cpu_s']} CPU s")
    for names in ORDERS:
        values = [right[name] for name in names]
        # Two that have solved the task cannot be told apart.
        is_rising = all(
            one < two or min(one, two) >= 0.995
            for one, two in itertools.pairwise(values)
        )
        print(f"{' < '.join(names)}  {'met' if is_rising else 'MISSED'}")
        if not is_rising:
            missed.append(" < ".join(names))
    return missed


def full(cells: Cells, minutes: float) -> None:
    """Trains at the published sizes, all rates of a model at once, until the time is up."""
    began = time.monotonic()
    for width in (64, 128):
        setting = dataclasses.replace(FULL, width=width)
        for name in FULL_NAMES:
            if time.monotonic() - began > 60 * minutes:
                return
            found = cells.get(
                f"{name} | D {width}",
                lambda n=name, s=setting: make_cell(n, s, s.rates, 0),
            )
            best = max(found["found"], key=lambda cell: cell["validation"])
            print(f"{name} D {width}: {json.dumps(best)}", flush=True)


def main() -> int:
    """Makes the table, or runs the gate, prints it, and writes files where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the gate's cells")
    parser.add_argument(
        "--full", action="store_true", help="published sizes, for a GPU"
    )
    parser.add_argument(
        "--minutes", type=float, default=25, help="time limit of --full"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", default="", help="names of models, separated by commas"
    )
    parser.add_argument(
        "--cached", action="store_true", help="only show the available cells"
    )
    parser.add_argument("--no-speed", action="store_true", help="skip decoding")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--pictures", type=record.folder, help="folder for figures")
    parser.add_argument(
        "--cells", default="runs/recall", help="folder of the results' cache"
    )
    options = parser.parse_args()
    cells = Cells(Path(options.cells), DEPENDENCIES)
    if options.full:
        record.require_rows_kept(options.json, "table", ())
        full(cells, options.minutes)
        record.require_rows_kept(options.json, "cells", cells.results)
        return _write(options.json, cells=cells.results)
    table = Table(cells, SMALL, cached=options.cached)
    if options.quick:
        missed = quick(table)
        return 1 if missed else 0
    return _whole_table(table, options)


def _whole_table(table: Table, options: argparse.Namespace) -> int:
    known = [name for names in GROUPS.values() for name in names] + list(TUNED)
    names = options.only.split(",") if options.only else known
    for name in names:
        if name not in known:
            print(f"recall: `--only` must name models of the table; got {name!r}.")
            return 2
    record.require_rows_kept(options.json, "table", names)
    found = {}
    for name in names:
        row = table.row(name, range(options.seeds))
        if row is not None:
            found[name] = row
    if not found:
        print(
            f"recall: `{table.cells.path}` must hold cells of the table; got none, so nothing is "
            "written. Run without `--cached` to compute them."
        )
        return 2
    record.require_rows_kept(options.json, "table", found)
    speeds = {}
    # In one run, whatever else is known of these models: speeds of two runs do not compare.
    if not options.no_speed and ("decode" in table.cells.results or not options.cached):
        timed = [name for name in names if name not in TUNED]
        speeds = table.cells.get("decode", lambda: decode_speeds(timed, SMALL))["found"]
    record.require_rows_kept(options.json, "decode", speeds)
    print(show(found, speeds, SMALL))
    missing = [name for name in known if name not in found]
    print(f"models without a cell: {', '.join(missing) or 'none'}")
    edges = [name for name, row in found.items() if row["at_edge"]]
    print(f"models whose rate is at the edge: {', '.join(edges) or 'none'}")
    if options.pictures:
        draw(options.pictures, found, speeds, SMALL)
    cells = {
        name: cell["found"]
        for name, cell in table.cells.results.items()
        if name != "decode"
    }
    _write(
        options.json,
        table=found,
        decode=speeds,
        not_run=missing,
        cells=cells,
    )
    return 1 if edges else 0


def _write(path: str | None, **numbers: Any) -> int:
    if path:
        packages = ("jax", "flax", "optax", "numpy")
        record.write(path, "benchmarks.recall", packages=packages, **numbers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
