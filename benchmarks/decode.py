"""The cost of a generated token by context length, which must not matter, and by batch size.

Run from the repository's root: `python -m benchmarks.decode [--json FILE]`. The model is random.
"""

import argparse
import functools
import os
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.timing import take_turns
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state

CONTEXTS = (64, 512, 4096)
BATCHES = (1, 8, 32)


def random_model(layers: int, width: int, vocab_size: int):
    """Makes a model and weights that give logits of ordinary size."""
    config = RWKV7Config(
        vocab_size=vocab_size,
        num_layers=layers,
        width=width,
    )
    model = RWKV7(config)
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, init_state(config))[
        "params"
    ]
    random = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.05 * random.standard_normal(leaf.shape, np.float32))

    return model, jax.tree.map(draw, shapes)


def tokens_per_second(
    model,
    params,
    outs: dict,
    *,
    tokens: int,
    repeats: int,
) -> dict[int, float]:
    """Measures generation after each of `outs`: the median of `repeats` runs of `tokens` tokens."""

    def run(out) -> None:
        prompts = [[]] * out.state.batch
        end = generate(
            model,
            params,
            prompts,
            out.state,
            logits=out.logits,
            tokens=tokens,
            temperature=0.8,
            top_p=0.9,
            key=jax.random.key(0),
            stop_ids=(),
        )
        jax.block_until_ready(end.logits)

    runs = {size: functools.partial(run, out) for size, out in outs.items()}
    # The first runs compile.
    for first in runs.values():
        first()
    rates = {}
    for size, found in take_turns(runs, repeats).items():
        seconds = statistics.median(one.wall for one in found)
        rates[size] = outs[size].state.batch * tokens / seconds
    return rates


def measure(
    model,
    params,
    *,
    tokens: int,
    repeats: int,
) -> dict[str, dict[int, float]]:
    """Measures tokens per second by context of one row, and by batch after the shortest context."""
    ids = np.random.default_rng(1).integers(1, model.config.vocab_size, max(CONTEXTS))
    prompts = {
        "by_context": {context: [ids[:context]] for context in CONTEXTS},
        "by_batch": {batch: [ids[: CONTEXTS[0]]] * batch for batch in BATCHES},
    }
    rates = {}
    for name, cases in prompts.items():
        outs = {
            size: generate(model, params, rows, tokens=0)
            for size, rows in cases.items()
        }
        rates[name] = tokens_per_second(
            model,
            params,
            outs,
            tokens=tokens,
            repeats=repeats,
        )
    return rates


def main() -> None:
    """Prints both tables; with `--json`, writes them with device, versions, date and command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument(
        "--tokens",
        type=int,
        default=128,
        help="tokens to generate, per row",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    model, params = random_model(args.layers, args.width, args.vocab)
    results = measure(
        model,
        params,
        tokens=args.tokens,
        repeats=args.repeats,
    )
    for name, rates in results.items():
        print(f"{name[3:]:>8}  tokens/s  ratio to first")
        first = next(iter(rates.values()))
        for size, rate in rates.items():
            print(f"{size:8d}  {rate:8.1f}  {rate / first:14.2f}")
    if args.json:
        rates = results["by_context"]
        record.write(
            args.json,
            "benchmarks.decode",
            load_average=os.getloadavg()[0],
            model={
                "layers": args.layers,
                "width": args.width,
                "vocab_size": args.vocab,
            },
            tokens_per_second=results,
            longest_to_shortest_context=rates[CONTEXTS[-1]] / rates[CONTEXTS[0]],
        )


if __name__ == "__main__":
    main()
