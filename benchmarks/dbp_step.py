"""The cost of decorrelated backpropagation: a DBP step next to an Adam step of the same state.

    python -m benchmarks.dbp_step --json benchmarks/results/cpu-dbp-step.json

The subject is an upscaled state of a model with random weights, as `train.py` tunes it: `static`,
M = 4 N features per head. Both kinds of step alternate in one process; the medians of their CPU
seconds are reported. `own` is DBP whose statistics need a separate forward pass, as for a loss from
outside this package. The exit code is 1 if DBP costs more than the target.
"""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import rwkv7_jax as rwkv
from benchmarks import record
from benchmarks.timing import RepeatedStep, median_processor_seconds
from rwkv7_jax.tuning.read_statistics import state_decorrelator

# The most that DBP may cost, in units of the Adam step.
BAR = 1.6

LEAVES = ("memory",)


def make_steps(args: argparse.Namespace) -> dict[str, RepeatedStep]:
    """Compiles the steps; each one continues from its last state."""
    config = rwkv.RWKV7Config(vocab_size=256, num_layers=args.layers, width=args.width)
    model = rwkv.RWKV7(config)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 256, (args.batch, args.length + 1)).astype(np.int32)
    batch = {"tokens": ids, "mask": np.ones((args.batch, args.length), np.float32)}
    tokens = jnp.asarray(ids[:1, :2])
    made: Any = model.init(jax.random.key(0), tokens, rwkv.init_state(config))
    params = made["params"]
    start = rwkv.upscale(model, params, ids[:, :-1], size=args.features)
    loss = rwkv.state_loss(model, params, leaves=LEAVES)
    decorrelator = state_decorrelator(
        model, params, start, leaves=LEAVES, method="dbp", rows=args.batch
    )
    adam = state_decorrelator(model, params, start, leaves=LEAVES)
    steps = {}
    # A function around a loss hides whose it is.
    for name, wrap, given, found in (
        ("adam", adam.wrap, loss, None),
        ("dbp", decorrelator.wrap, loss, decorrelator.statistics),
        (
            "own",
            decorrelator.wrap,
            Partial(lambda *x: loss(*x)),
            decorrelator.statistics,
        ),
    ):
        tx = wrap(optax.adam(1e-3))
        step = rwkv.make_train_step(given, tx, statistics=found)
        steps[name] = RepeatedStep(step, rwkv.TrainState.create(start, tx), batch)
    return steps


def main() -> None:
    """Prints a row for each kind of step; with `--json`, writes them with versions and date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--features", type=int, default=256, help="M")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    steps = make_steps(args)
    # The first calls compile.
    for run in steps.values():
        run()
    medians = median_processor_seconds(steps, args.rounds)
    for name, median in medians.items():
        share = median / medians["adam"]
        print(f"{name:<6}{median:7.2f} s  {share:5.2f} of Adam", flush=True)
    if args.json:
        shape = {name: getattr(args, name) for name in ("layers", "width", "features")}
        record.write(
            args.json,
            "benchmarks.dbp_step",
            packages=("jax", "jaxlib"),
            **shape,
            batch=args.batch,
            length=args.length,
            processor_seconds=medians,
            bar=BAR,
        )
    if medians["dbp"] > BAR * medians["adam"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
