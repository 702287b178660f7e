"""Several start states in one program: time and memory next to one state and to separate runs.

    python -m benchmarks.many_states --json benchmarks/results/cpu-many-states.json

Three compiled steps of the shipped base alternate: K states of R rows each; one state of K R rows
(the same arithmetic); and one state of R rows, which K separate runs would repeat K times. CPU time
is summed over all threads and hardly depends on other load.
"""

import argparse
import os
import statistics
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

import rwkv7_jax as rwkv
from benchmarks import record
from benchmarks.lab import ASSETS
from benchmarks.timing import RepeatedStep, take_turns
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.optim.optimizer import build_optimizer
from rwkv7_jax.training.stacked_step import (
    create_stack,
    make_stacked_step,
    params_of,
    stack_params,
)
from rwkv7_jax.training.train_step import TrainState, make_train_step
from rwkv7_jax.tuning.state_tuning import state_loss

RATE = 0.1
WARM = 2


class Program(NamedTuple):
    """A step with its state and batch.

    Attributes:
        step: compiled at its first call.
        train: the state before it.
        batch: of every step.
    """

    step: Any
    train: TrainState
    batch: Batch


def rows_of(batch: Batch, first: int, count: int) -> Batch:
    """Takes some rows of a batch."""
    return batch.select_rows(slice(first, first + count))


def programs(states: int, rows: int, length: int) -> dict[str, Program]:
    """Makes the three programs, whose rows are the same."""
    params, config = rwkv.load_model(ASSETS / "tiny.pth", dtype="float32")
    model = rwkv.RWKV7(config)
    loss = state_loss(model, params)
    start = rwkv.init_state(config)
    stacked_tx = build_optimizer(1.0, clip=1.0, eps=1e-6)
    tx = build_optimizer(RATE, clip=1.0, eps=1e-6)
    batch = next(
        iter(
            rwkv.data.packed(
                "charmaps",
                tokenizer=rwkv.Tokenizer.bytes(),
                batch_size=states * rows,
                length=length,
                seed=0,
            )
        )
    )
    stack = create_stack(stack_params([start] * states), stacked_tx)
    rates = np.full(states, RATE, np.float32)
    step = make_train_step(loss, tx)
    return {
        "states": Program(make_stacked_step(loss, stacked_tx, rates), stack, batch),
        "one_state_all_rows": Program(step, TrainState.create(start, tx), batch),
        "one_state": Program(
            make_train_step(loss, tx),
            TrainState.create(start, tx),
            rows_of(batch, 0, rows),
        ),
    }


def temporaries(program: Program) -> float:
    """Reads the MiB of a step's intermediate results off the compiled program."""
    compiled = program.step.lower(program.train, program.batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def largest_difference(made: dict[str, Program], rows: int, steps: int) -> float:
    """Tunes all states together and one by one; gives the largest relative error of a state."""
    together = made["states"]
    train = jax.tree.map(lambda leaf: leaf.copy(), together.train)
    for _ in range(steps):
        train, _ = together.step(train, together.batch)
    errors = []
    for index in range(together.batch.tokens.shape[0] // rows):
        own = made["one_state"]
        alone = jax.tree.map(lambda leaf: leaf.copy(), own.train)
        batch = rows_of(together.batch, index * rows, rows)
        for _ in range(steps):
            alone, _ = own.step(alone, batch)
        expected = np.asarray(alone.params.wkv)
        found = np.asarray(params_of(train.params, index).wkv)
        errors.append(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return float(max(errors))


def measure(made: dict[str, Program], rounds: int) -> dict[str, dict[str, float]]:
    """Measures a step of each program, in turns; the medians in milliseconds."""
    runs = {}
    for name, one in made.items():
        train = jax.tree.map(lambda leaf: leaf.copy(), one.train)
        runs[name] = RepeatedStep(one.step, train, one.batch)
    found = {}
    for name, times in take_turns(runs, WARM + rounds).items():
        walls = [one.wall for one in times[WARM:]]
        processor = statistics.median(one.processor for one in times[WARM:])
        found[name] = {
            "wall_ms": 1000 * statistics.median(walls),
            "least_wall_ms": 1000 * min(walls),
            "processor_ms": 1000 * processor,
            "first_step_seconds": times[0].wall,
            "temporaries_mib": temporaries(made[name]),
        }
    return found


def main() -> None:
    """Measures, prints a line for each program, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--states", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="steps of the comparison")
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    made = programs(options.states, options.rows, options.length)
    found = measure(made, options.rounds)
    for name, numbers in found.items():
        text = "  ".join(f"{key} {value:.1f}" for key, value in numbers.items())
        print(f"{name:20}{text}", flush=True)
    error = largest_difference(made, options.rows, options.steps)
    stack = found["states"]
    ratios = {
        "to_one_state_of_all_rows": stack["processor_ms"]
        / found["one_state_all_rows"]["processor_ms"],
        "to_runs_of_their_own": stack["processor_ms"]
        / (options.states * found["one_state"]["processor_ms"]),
        "temporaries_to_one_state_of_all_rows": stack["temporaries_mib"]
        / found["one_state_all_rows"]["temporaries_mib"],
    }
    print("  ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))
    print(f"largest relative error after {options.steps} steps {error:.1e}")
    if options.json:
        record.write(
            options.json,
            "benchmarks.many_states",
            packages=("jax", "optax"),
            states=options.states,
            rows=options.rows,
            length=options.length,
            programs=found,
            processor_ratios=ratios,
            largest_relative_error=error,
            steps_compared=options.steps,
        )


if __name__ == "__main__":
    main()
