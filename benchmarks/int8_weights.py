"""The cost of frozen weights in 8 bits: bits per byte, logits, the tuned state, time and memory.

    python -m benchmarks.int8_weights --json benchmarks/results/cpu-int8-weights.json

Quality is measured with the shipped model on held-out text. Speed is measured with a random model:
a generated token, a prompt, and a step of state tuning, with weights in float32, bfloat16 and 8
bits. The forms alternate and the unit is CPU time, so a busy machine slows all of them equally.
Activations are float32 in all of them, which is the fastest on a CPU. `benchmarks.real_models`
measures the loss of any other checkpoint.
"""

import argparse
import dataclasses
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rwkv7_jax as rwkv
from benchmarks import record
from benchmarks.decode import random_model
from benchmarks.lab import ASSETS
from benchmarks.timing import median_processor_seconds
from rwkv7_jax.data.loading import batch_at, token_stream, windows
from rwkv7_jax.model.int8_weights import quantize

TEXTS = ("stdlib", "charmaps", "c-headers")
TUNED_ON = "charmaps"
STEPS = 60


def held_out(text: str, tokenizer: rwkv.Tokenizer):
    """Reads windows of a text's held-out part; of the base's own text what it never saw."""
    share = 0.05 if text == "stdlib" else 0.1
    stream = token_stream(text, tokenizer, split="held_out", held_out=share)
    return windows(stream, 512, 32)


def tune(model, params, tokenizer: rwkv.Tokenizer) -> Any:
    """Tunes a start state on a style."""
    tx = optax.adam(optax.cosine_decay_schedule(0.3, STEPS))
    step = rwkv.make_train_step(rwkv.state_loss(model, params), tx)
    train = rwkv.TrainState.create(rwkv.init_state(model.config), tx)
    stream = token_stream(TUNED_ON, tokenizer, held_out=0.1)
    for number in range(STEPS):
        rows = batch_at(stream, number, batch_size=4, length=256, seed=0)
        train, _ = step(train, rows)
    return train.params


def losses() -> dict[str, Any]:
    """Measures the shipped model in both forms, untuned and tuned."""
    path = ASSETS / "tiny.pth"
    floats, config = rwkv.load_model(path, dtype="float32")
    rounded, _ = rwkv.load_model(path, dtype="float32", weights="int8")
    model = rwkv.RWKV7(config)
    tokenizer = rwkv.Tokenizer.bytes()
    zero = rwkv.init_state(config)

    def bits(params, state, text: str) -> float:
        rows = held_out(text, tokenizer)
        return rwkv.score(model, params, state, rows, tokenizer).bits_per_byte

    untuned = {}
    for text in TEXTS:
        was = bits(floats, zero, text)
        untuned[text] = {"float32": was, "lost": bits(rounded, zero, text) - was}
    rows = held_out(TEXTS[0], tokenizer).tokens[:4, :-1]
    forward = jax.jit(lambda params: model.apply({"params": params}, rows, zero4)[0])
    zero4 = rwkv.init_state(config, len(rows))
    logits = np.asarray(forward(floats), np.float64)
    off = np.asarray(forward(rounded), np.float64) - logits
    tuned = {}
    for name, base in (("float32", floats), ("int8", rounded)):
        state = tune(model, base, tokenizer)
        tuned[f"tuned on {name}"] = {
            "scored on float32": bits(floats, state, TUNED_ON),
            "scored on int8": bits(rounded, state, TUNED_ON),
        }
    return {
        "bits_per_byte": untuned,
        "logits": {
            "largest": float(np.abs(logits).max()),
            "largest_difference": float(np.abs(off).max()),
            "relative_rms": float(np.sqrt(np.mean(off**2) / np.mean(logits**2))),
        },
        TUNED_ON: tuned,
    }


def forms_of(params) -> dict[str, Any]:
    """Returns the weights in each form."""
    return {
        "float32": params,
        "bfloat16": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params),
        "int8": quantize(params),
    }


def speeds(layers: int, width: int, vocab_size: int, repeats: int) -> dict[str, Any]:
    """Measures the seconds of the three jobs, by the form of the weights."""
    model, params = random_model(layers, width, vocab_size)
    config = dataclasses.replace(model.config, remat="block")
    model = rwkv.RWKV7(config)
    forms = forms_of(params)
    ids = np.random.default_rng(0).integers(1, vocab_size, (1, 257)).astype(np.int32)
    start = rwkv.init_state(config)
    mask = np.ones((1, 256), np.float32)

    @jax.jit
    def hidden(params):
        return model.apply({"params": params}, ids, start, method="hidden")[0]

    @jax.jit
    def gradient(params, state):
        loss = rwkv.state_loss(model, params)
        batch = {"tokens": ids, "mask": mask}
        return jax.grad(lambda state: loss(state, batch)[0])(state)

    def decode(params):
        return rwkv.generate(
            model, params, ids[0, :4], tokens=32, temperature=0.0, stop_ids=()
        ).logits

    jobs = {
        "32 generated tokens": decode,
        "a prompt of 257 tokens": hidden,
        "a gradient of the state, 1 x 256": lambda params: gradient(params, start),
    }
    seconds = {}
    for name, job in jobs.items():
        cases = {}
        for form, tree in forms.items():
            cases[form] = lambda job=job, tree=tree: jax.block_until_ready(job(tree))
            # The first call compiles.
            cases[form]()
        seconds[name] = median_processor_seconds(cases, repeats)
    held = {}
    for form, tree in forms.items():
        held[form] = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    return {"bytes": held, "seconds": seconds}


def main() -> None:
    """Prints the tables; with `--json`, writes them with device, versions, date and command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    sizes = {"layers": args.layers, "width": args.width, "vocab_size": args.vocab}
    timed = speeds(args.layers, args.width, args.vocab, args.repeats)
    for name, times in timed["seconds"].items():
        ratios = "  ".join(
            f"{form} {seconds:.3f} s ({seconds / times['float32']:.2f})"
            for form, seconds in times.items()
        )
        print(f"{name:<34}{ratios}", flush=True)
    lost = losses()
    for text, row in lost["bits_per_byte"].items():
        print(f"{text:<34}{row['float32']:.4f} bits per byte, {row['lost']:+.5f}")
    print(lost["logits"])
    print(lost[TUNED_ON])
    if args.json:
        record.write(
            args.json,
            "benchmarks.int8_weights",
            load_average=os.getloadavg()[0],
            model=sizes,
            speed=timed,
            shipped_model=lost,
        )


if __name__ == "__main__":
    main()
