"""Does decorrelated backpropagation help when all weights are trained from scratch?

    python -m benchmarks.dense_decorrelation --pictures benchmarks/results \
        --json benchmarks/results/cpu-dense-decorrelation.json

The small toy model learns the mixture of tasks, and a small byte model learns text. Adam and SGD
run with and without decorrelated inputs of the projections, for the same number of steps, on the
same batches and from the same weights. The published rule is compared with ours (damped, averaged,
clipped, scaled). The first seed selects a method's learning rate from several; further seeds (of
weights and batches) use it. The program reports a rate at the edge of those that were tried. Every
run is cached as soon as it is complete.
"""

import argparse
import functools
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rwkv7_jax as rwkv
from benchmarks import record
from benchmarks.lab import RULES, rate_at
from benchmarks.paper_table import Cells
from benchmarks.rates import at_edge
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.loading import batch_at, token_stream
from rwkv7_jax.data.tasks.synthetic_tasks import task_batch
from rwkv7_jax.data.token_streams import TokenStream
from rwkv7_jax.reports import plots as pictures
from rwkv7_jax.training.projection_statistics import layer_statistics, projections

CONFIG = rwkv.RWKV7Config(
    vocab_size=257,
    num_layers=2,
    width=64,
    head_size=32,
    ffn_width=192,
    decay_rank=16,
    icl_rank=16,
    value_rank=16,
    gate_rank=32,
)
# Inner optimizer, rule of decorrelation (None for none), learning rates.
METHODS: dict[str, tuple[str, str | None, tuple[float, ...]]] = {
    "Adam": ("adam", None, (2e-3, 4e-3, 8e-3, 1.6e-2)),
    "Adam, DBP": ("adam", "ours", (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
    "Adam, DBP as published": (
        "adam",
        "as published, step 1e-3",
        (2e-3, 4e-3, 8e-3, 1.6e-2),
    ),
    "SGD": ("sgd", None, (0.3, 1.0, 3.0)),
    "SGD, DBP": ("sgd", "ours", (0.03, 0.1, 0.3, 1.0)),
}
JOBS = ("mixture", "stdlib")


@functools.cache
def text() -> TokenStream:
    """Reads the standard library's sources as bytes."""
    return token_stream("stdlib", rwkv.Tokenizer.bytes(), split="train")


def batch(job: str, step: int, seed: int) -> Batch:
    """Makes rows of the mixture of tasks, or of text."""
    if job == "mixture":
        return task_batch(
            job,
            step,
            batch_size=32,
            length=32,
            seed=seed,
        )
    return batch_at(
        text(),
        step,
        batch_size=8,
        length=128,
        seed=seed,
    )


def optimizer(inner: str, rule: str | None) -> optax.GradientTransformation:
    """Makes an optimizer with a settable rate; clips gradients at norm 1 as pretraining does."""

    def build(learning_rate):
        if inner == "sgd":
            made = optax.sgd(learning_rate, momentum=0.9)
        else:
            made = optax.adam(learning_rate, b2=0.98, eps=1e-8)
        if rule is not None:
            made = rwkv.decorrelate(made, mask=projections, **RULES[rule])
        return optax.chain(optax.clip_by_global_norm(1.0), made)

    return optax.inject_hyperparams(build)(learning_rate=1.0)


@functools.cache
def program(method: str):
    """Makes the model, the optimizer and the compiled step of a method, for all rates and seeds."""
    inner, rule, _ = METHODS[method]
    model = rwkv.RWKV7(CONFIG)
    tx = optimizer(inner, rule)
    statistics = None if rule is None else layer_statistics(model, rows=4)
    loss = rwkv.pretrain_loss(model, l2wrap=0.0)
    return model, tx, rwkv.make_train_step(loss, tx, statistics=statistics)


def learn(job: str, method: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Trains once; returns losses (means over 20 steps) and seconds."""
    model, tx, step = program(method)
    tokens = jnp.zeros((1, 1), jnp.int32)
    state = rwkv.init_state(model.config)
    params = jax.jit(model.init)(jax.random.key(seed), tokens, state)["params"]
    train = rwkv.TrainState.create(params, tx)
    losses = []
    began = 0.0
    for number in range(steps):
        now = np.float32(rate * rate_at(number, steps, 40))
        train.opt_state.hyperparams["learning_rate"] = jnp.asarray(now)
        train, metrics = step(train, batch(job, number, seed))
        losses.append(metrics["loss_nats"])
        if number == 0:
            # The clock starts after the step that compiles.
            jax.block_until_ready(metrics)
            began = time.monotonic()
    losses = [float(loss) for loss in losses]
    seconds = (time.monotonic() - began) / (steps - 1)
    blocks = np.mean(np.reshape(losses[: steps // 20 * 20], (-1, 20)), axis=1)
    return {"loss_nats": blocks.tolist(), "seconds_per_step": seconds}


def end_of(run: dict[str, Any]) -> float:
    """Returns the loss at the end of a run; one that diverged counts as infinite."""
    end = run["loss_nats"][-1]
    return end if math.isfinite(end) else math.inf


def compare(
    cells: Cells, job: str, method: str, *, steps: int, seeds: int
) -> dict[str, Any]:
    """Chooses a method's rate with the first seed, and trains with further seeds at that rate."""

    def run(rate: float, seed: int) -> dict[str, Any]:
        name = f"{job} | {method} | {rate:g} | {seed} | {steps}"
        made = cells.get(name, lambda: learn(job, method, rate, seed, steps))
        print(f"{name}: {end_of(made['found']):.3f}", flush=True)
        return made["found"]

    rates = METHODS[method][2]
    by_rate = {rate: run(rate, 0) for rate in rates}
    rate = min(rates, key=lambda one: end_of(by_rate[one]))
    return {
        "rate": rate,
        "at_edge": at_edge(rate, rates),
        "by_rate": {f"{one:g}": end_of(by_rate[one]) for one in rates},
        "seeds": [run(rate, seed) for seed in range(seeds)],
    }


def draw(path: Path, by_method: dict[str, Any]) -> None:
    """Draws the losses of one job's methods, means over the seeds."""
    lines = {}
    for method, compared in by_method.items():
        means = np.mean([run["loss_nats"] for run in compared["seeds"]], axis=0)
        lines[method] = [(20 * i + 10, float(loss)) for i, loss in enumerate(means)]
    pictures.curves(path, lines, x="step", y="loss (nats)")


def main() -> None:
    """Runs all methods, prints the best runs, and writes files where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--pictures", type=record.folder, help="folder for figures")
    parser.add_argument(
        "--cells", default="runs/dense", help="folder of the results' cache"
    )
    options = parser.parse_args()
    for job in JOBS:
        record.require_rows_kept(options.json, job, options.methods)
    cells = Cells(Path(options.cells))
    found: dict[str, dict[str, Any]] = {job: {} for job in JOBS}
    for method in options.methods:
        for job in JOBS:
            found[job][method] = compare(
                cells, job, method, steps=options.steps, seeds=options.seeds
            )
    for job, by_method in found.items():
        for method, one in by_method.items():
            ends = [end_of(run) for run in one["seeds"]]
            edge = " (edge)" if one["at_edge"] else ""
            print(
                f"{job:10}{method:26}rate {one['rate']:g}{edge}  loss {np.mean(ends):.3f} nats "
                f"({', '.join(f'{end:.3f}' for end in ends)})"
            )
        if options.pictures:
            draw(options.pictures / f"dense-decorrelation-{job}.png", by_method)
    if options.json:
        packages = ("jax", "flax", "optax", "numpy")
        record.write(
            options.json,
            "benchmarks.dense_decorrelation",
            packages=packages,
            steps=options.steps,
            not_run=[method for method in METHODS if method not in options.methods],
            **found,
        )


if __name__ == "__main__":
    main()
