"""How fast batches come from a cache, in tokens a second on one core.

Run from the repository's root: `taskset -c 1 python -m benchmarks.data_rate [--json FILE]`. The
cache holds random ids in documents of 20 to 2,000, a tenth of which is held out and an eighth of
which is only read; it lies in the page cache. Seconds are process time, the median of several runs;
filling is not counted.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import record
from rwkv7_jax.data.loading import data_hash, packed, token_stream
from rwkv7_jax.text.tokenizer import Tokenizer

SHAPES = ((16, 4096), (8, 512), (64, 128))
CHOICES = {
    "stream, shuffled": {},
    "stream, cubic": {"order": "cubic"},
    "documents": {"packing": "documents"},
}


def write(folder: Path, tokens: int) -> Path:
    """A cache of about so many tokens, as `rwkv7 data` would write it."""
    from rwkv7_jax.data.binidx import BinidxWriter
    from rwkv7_jax.data.token_cache import FORMAT

    random, path = np.random.default_rng(0), folder / "x.bin"
    numbers = {"documents": 0, "tokens": 0, "learnt": 0}
    with BinidxWriter(path) as writer:
        keys, mask = writer.beside(".keys"), writer.beside(".mask")
        while numbers["tokens"] < tokens:
            ids = random.integers(1, 65530, random.integers(20, 2000))
            ids[-1] = 0
            learnt = (np.arange(len(ids)) >= len(ids) // 8).astype(np.uint8)
            writer.add(ids)
            writer.end()
            mask.write(learnt)
            keys.write(random.bytes(8))
            numbers["documents"] += 1
            numbers["tokens"] += len(ids)
            numbers["learnt"] += int(learnt.sum())
        card = numbers | {"vocabulary": "world", "bytes": 0, "skipped": 0, "format": FORMAT}
        writer.beside(".card.json").write(json.dumps(card).encode())
    return path


def tokens_per_second(batches, tokens: float, steps: int, repeats: int) -> float:
    """The median of several runs of `steps` batches of so many tokens."""
    rates = []
    for _ in range(repeats):
        begun = time.process_time()
        for _ in itertools.islice(batches, steps):
            pass
        rates.append(steps * tokens / (time.process_time() - begun))
    return statistics.median(rates)


def main() -> None:
    """Print a table; with `--json`, write it with device, versions, date and command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), args.tokens)
        world, begun = Tokenizer.world(), time.process_time()
        stream = token_stream(path, world, split="train", held_out=0.1)
        opened, begun = time.process_time() - begun, time.process_time()
        data_hash(stream)
        hashed = time.process_time() - begun
        print(f"{len(stream):,} tokens opened in {opened:.2f} s, hashed in {hashed:.2f} s")
        for (batch_size, length), (name, choices) in itertools.product(SHAPES, CHOICES.items()):
            batches = packed(
                stream, batch_size=batch_size, length=length, tokenizer=world, **choices
            )
            tokens = batch_size * length
            steps = 10_000_000 // tokens
            if name == "documents":
                tokens *= float(np.minimum(np.diff(stream.starts) - 1, length).mean() / length)
            rate = tokens_per_second(batches, tokens, steps, args.repeats)
            rows.append({"shape": f"{batch_size} x {length}", "what": name, "tokens/s": rate})
            print(f"{batch_size:>3} x {length:<5} {name:<18}{rate / 1e6:>8.1f} million tokens/s")
    if args.json:
        record.write(
            args.json,
            "benchmarks.data_rate",
            packages=("numpy",),
            tokens=len(stream),
            opened_seconds=opened,
            hashed_seconds=hashed,
            rows=rows,
        )


if __name__ == "__main__":
    main()
