"""Does decorrelated backpropagation pay when all weights are trained from scratch?

    python -m benchmarks.dense_decorrelation --pictures benchmarks/results \
        --json benchmarks/results/cpu-dense-decorrelation.json

The small toy model learns the mixture of tasks, and a small byte model learns text, at equal steps
and equal batches, from the same weights: by SGD and by Adam, with and without decorrelated inputs
of the projections, each at several learning rates of which the best counts. The published rule is
compared with ours (damped, averaged, clipped, scaled). Seconds per step are of the same run.
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
from benchmarks.lab import rate_at
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.loading import batch_at, token_stream
from rwkv7_jax.data.tasks.synthetic_tasks import task_batch
from rwkv7_jax.data.token_streams import TokenStream
from rwkv7_jax.reports import plots as pictures
from rwkv7_jax.runs.monitoring.progress_bar import ProgressBar
from rwkv7_jax.training.projection_statistics import layer_statistics, projections

SIZES = {"decay_rank": 16, "icl_rank": 16, "value_rank": 16, "gate_rank": 32}
SIZES |= {
    "vocab_size": 257,
    "num_layers": 2,
    "width": 64,
    "head_size": 32,
    "ffn_width": 192,
}
PUBLISHED = {
    "iterations": 1,
    "damping": 0.0,
    "average": 0.0,
    "clip": None,
    "normalise": False,
}
# Inner optimizer, decorrelation (None for none), learning rates.
METHODS: dict[str, tuple[str, dict | None, tuple[float, ...]]] = {
    "SGD": ("sgd", None, (0.3, 1.0)),
    "SGD, DBP": ("sgd", {}, (0.1, 0.3)),
    "Adam": ("adam", None, (2e-3, 4e-3, 8e-3)),
    "Adam, DBP": ("adam", {}, (1e-3, 2e-3, 4e-3)),
    "Adam, DBP as published": ("adam", PUBLISHED | {"rate": 1e-3}, (2e-3, 4e-3, 8e-3)),
}
JOBS = ("mixture", "stdlib")


@functools.cache
def text() -> TokenStream:
    """Reads the standard library's sources as bytes."""
    return token_stream("stdlib", rwkv.Tokenizer.bytes(), split="train")


def batch(job: str, step: int) -> Batch:
    """Makes rows of the mixture of tasks, or of text."""
    if job == "mixture":
        return task_batch(
            job,
            step,
            batch_size=32,
            length=32,
            seed=0,
        )
    return batch_at(
        text(),
        step,
        batch_size=8,
        length=128,
        seed=0,
    )


def optimizer(inner: str, decorrelation: dict | None) -> optax.GradientTransformation:
    """Makes an optimizer with a settable rate; clips gradients at norm 1 as pretraining does."""

    def build(learning_rate):
        if inner == "sgd":
            made = optax.sgd(learning_rate, momentum=0.9)
        else:
            made = optax.adam(learning_rate, b2=0.98, eps=1e-8)
        if decorrelation is not None:
            made = rwkv.decorrelate(made, mask=projections, **decorrelation)
        return optax.chain(optax.clip_by_global_norm(1.0), made)

    return optax.inject_hyperparams(build)(learning_rate=1.0)


def learn(
    job: str,
    method: str,
    steps: int,
    bar: ProgressBar,
    done: int,
) -> list[dict[str, Any]]:
    """Trains once for each learning rate; returns losses (means over 20 steps) and seconds."""
    inner, decorrelation, rates = METHODS[method]
    model = rwkv.RWKV7(rwkv.RWKV7Config(**SIZES))
    tokens = jnp.zeros((1, 1), jnp.int32)
    state = rwkv.init_state(model.config)
    params = jax.jit(model.init)(jax.random.key(0), tokens, state)["params"]
    tx = optimizer(inner, decorrelation)
    statistics = None if decorrelation is None else layer_statistics(model, rows=4)
    step = rwkv.make_train_step(
        rwkv.pretrain_loss(model, l2wrap=0.0), tx, statistics=statistics
    )
    runs = []
    for rate in rates:
        train = rwkv.TrainState.create(params, tx)
        losses = []
        began = 0.0
        for number in range(steps):
            now = np.float32(rate * rate_at(number, steps, 40))
            train.opt_state.hyperparams["learning_rate"] = jnp.asarray(now)
            train, metrics = step(train, batch(job, number))
            losses.append(metrics["loss_nats"])
            if number == 0:
                # The clock starts after the step that compiles.
                jax.block_until_ready(metrics)
                began = time.monotonic()
        losses = [float(loss) for loss in losses]
        seconds = (time.monotonic() - began) / (steps - 1)
        blocks = np.mean(np.reshape(losses[: steps // 20 * 20], (-1, 20)), axis=1)
        runs.append(
            {"rate": rate, "loss_nats": blocks.tolist(), "seconds_per_step": seconds}
        )
        done += 1
        bar.update(done, f"{job}, {method}, {rate}: {blocks[-1]:.3f}")
    return runs


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the run that ends lowest; one that diverged counts as infinite."""
    ends = [run["loss_nats"][-1] for run in runs]
    return runs[
        int(np.argmin([end if math.isfinite(end) else math.inf for end in ends]))
    ]


def main() -> None:
    """Runs all methods, prints the best runs, and writes files where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--pictures", help="folder for pictures")
    options = parser.parse_args()
    total = len(JOBS) * sum(len(rates) for *_, rates in METHODS.values())
    bar = ProgressBar(total, "runs")
    done = 0
    found = {}
    for job in JOBS:
        found[job] = {}
        for method in METHODS:
            found[job][method] = learn(job, method, options.steps, bar, done)
            done += len(METHODS[method][2])
    bar.close()
    for job, by_method in found.items():
        for method, runs in by_method.items():
            one = best(runs)
            print(
                f"{job:10}{method:26}best rate {one['rate']:<8g}loss {one['loss_nats'][-1]:.3f} "
                f"nats, {1e3 * one['seconds_per_step']:.0f} ms a step"
            )
        if options.pictures:
            lines = {
                method: [
                    (20 * i + 10, loss)
                    for i, loss in enumerate(best(runs)["loss_nats"])
                ]
                for method, runs in by_method.items()
            }
            path = Path(options.pictures) / f"dense-decorrelation-{job}.png"
            pictures.curves(
                path,
                lines,
                x="step",
                y="loss (nats)",
            )
    if options.json:
        packages = ("jax", "flax", "optax", "numpy")
        record.write(
            options.json,
            "benchmarks.dense_decorrelation",
            packages=packages,
            steps=options.steps,
            **found,
        )


if __name__ == "__main__":
    main()
