"""The throughput of batches from a token cache, in tokens per second on one core.

Run from the repository's root: `taskset -c 1 python -m benchmarks.data_rate [--json FILE]`. The
cache holds random ids in documents of 20 to 2,000. A tenth of them is held out, and an eighth does
not count in the loss. The cache is in the page cache. Seconds are process time, the median of
several runs. Padding is not counted.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.timing import time_call
from rwkv7_jax.data.binidx import BinidxWriter
from rwkv7_jax.data.loading import batches_from, data_hash, token_stream
from rwkv7_jax.data.token_cache import CacheMetadata
from rwkv7_jax.data.token_streams import TokenStream
from rwkv7_jax.text.tokenizer import Tokenizer

SHAPES = ((16, 4096), (8, 512), (64, 128))
CHOICES = {
    "stream, shuffled": {},
    "stream, cubic": {"order": "cubic"},
    "documents": {"packing": "documents"},
}


def write(folder: Path, tokens: int) -> Path:
    """Writes a cache of about so many random tokens, as `rwkv7 data` would write it."""
    random = np.random.default_rng(0)
    path = folder / "x.bin"
    documents = 0
    written = 0
    in_loss = 0
    with BinidxWriter(path) as writer:
        hashes = writer.sibling(".keys")
        masks = writer.sibling(".mask")
        while written < tokens:
            size = random.integers(20, 2000)
            ids = random.integers(1, 65530, size)
            ids[-1] = 0
            # The first eighth of a document stands for a prompt.
            mask = (np.arange(size) >= size // 8).astype(np.uint8)
            writer.add(ids)
            writer.end()
            masks.write(mask.tobytes())
            hashes.write(random.bytes(8))
            documents += 1
            written += len(ids)
            in_loss += int(mask.sum())
        card = CacheMetadata(
            vocabulary="world",
            documents=documents,
            tokens=written,
            learnt=in_loss,
            bytes=0,
            skipped=0,
        )
        writer.sibling(".card.json").write(
            json.dumps(dataclasses.asdict(card)).encode()
        )
    return path


def tokens_per_second(
    batches,
    tokens: float,
    steps: int,
    repeats: int,
) -> float:
    """Measures `steps` batches of so many tokens; returns the median of several runs."""

    def run() -> None:
        for _ in itertools.islice(batches, steps):
            pass

    found = [time_call(run) for _ in range(repeats)]
    return statistics.median(steps * tokens / one.processor for one in found)


def measure(stream: TokenStream, repeats: int) -> list[dict[str, Any]]:
    """Measures batches of every shape and way of packing, and prints a line for each."""
    rows = []
    for (batch_size, length), (name, choices) in itertools.product(
        SHAPES, CHOICES.items()
    ):
        batches = batches_from(
            stream,
            batch_size=batch_size,
            length=length,
            **choices,
        )
        tokens = batch_size * length
        steps = 10_000_000 // tokens
        if name == "documents":
            targets = np.minimum(np.diff(stream.starts) - 1, length)
            tokens *= float(targets.mean() / length)
        rate = tokens_per_second(batches, tokens, steps, repeats)
        rows.append(
            {"shape": f"{batch_size} x {length}", "what": name, "tokens/s": rate}
        )
        print(
            f"{batch_size:>3} x {length:<5} {name:<18}{rate / 1e6:>8.1f} million tokens/s"
        )
    return rows


def main() -> None:
    """Prints a table; with `--json`, writes it with device, versions, date and command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), args.tokens)
        world = Tokenizer.world()
        began = time.process_time()
        stream = token_stream(
            path,
            world,
            split="train",
            held_out=0.1,
        )
        opened = time.process_time() - began
        began = time.process_time()
        data_hash(stream)
        hashed = time.process_time() - began
        print(
            f"{len(stream):,} tokens opened in {opened:.2f} s, hashed in {hashed:.2f} s"
        )
        rows = measure(stream, args.repeats)
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
