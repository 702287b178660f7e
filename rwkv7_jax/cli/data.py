"""`rwkv7 data`: text becomes ids on the disk, and is shown as training sees it."""

import argparse
from pathlib import Path

import numpy as np

from rwkv7_jax.data.choices import ON_BAD, PACKINGS

_SOURCE = "a .jsonl or text file, a folder, a built-in text, or several with commas"


def add_data_command(subparsers) -> None:
    """The parser of `data`, added to those of `rwkv7`."""
    parser = subparsers.add_parser(
        "data",
        help="turn text into ids on the disk, or show rows of either",
        usage="%(prog)s [-h] SOURCE OUT [options]  or  %(prog)s --show N PATH [options]",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help=_SOURCE)
    add("target", metavar="OUT", nargs="?", help="OUT.bin and its neighbours; left out with --show")
    add("--vocabulary", choices=("world", "bytes"), help="world; of a .bin its own")
    add("--on-bad", choices=ON_BAD, default="error", help="bad lines (%(default)s)")
    add("--show", type=int, metavar="N", help="print N rows of what PATH names and write nothing")
    add("--length", type=int, default=128, help="tokens of a row that is shown (%(default)s)")
    add("--packing", choices=PACKINGS, default="stream", help="(%(default)s)")
    add("--seed", type=int, default=0, help="of the rows that are shown (%(default)s)")
    parser.set_defaults(run=run_data)


def run_data(options: argparse.Namespace) -> None:
    """A cache is written, or rows are printed."""
    from rwkv7_jax.data.token_cache import read_card
    from rwkv7_jax.text.tokenizer import Tokenizer

    sources = [part for part in options.source.split(",") if part]
    # A cache knows its vocabulary.
    cards = [read_card(part) for part in sources if part.endswith((".bin", ".idx"))]
    own = next((card.vocabulary for card in cards if card), "world")
    name = options.vocabulary or own
    tokenizer = Tokenizer.bytes() if name == "bytes" else Tokenizer.world()
    if options.show is not None:
        _show(options, sources, tokenizer)
    elif options.target is None:
        raise ValueError("data: `OUT` must be given, or `--show`; got neither.")
    else:
        _write(options, sources, tokenizer)


def _write(options: argparse.Namespace, sources: list[str], tokenizer) -> None:
    from rwkv7_jax.data.readers import size_of
    from rwkv7_jax.data.token_cache import write_cache
    from rwkv7_jax.runs.progress_bar import ProgressBar

    for source in sources:
        if source.endswith((".bin", ".idx")):
            raise ValueError(f"data: `SOURCE` must be text; got the ids of {source}.")
    target = Path(options.target)
    path = target if target.suffix == ".bin" else Path(f"{target}.bin")
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = ProgressBar(sum(map(size_of, sources)), "tokenizing")

    def tell(done: int, total: int) -> None:
        bar.update(done, f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB")

    try:
        card, stats = write_cache(sources, path, tokenizer, on_bad=options.on_bad, progress=tell)
    finally:
        bar.close()
    learnt = "all" if card.learnt == card.tokens else f"{card.learnt:,}"
    print(
        f"{path}: {card.documents:,} documents, {card.tokens:,} {card.vocabulary} tokens "
        f"({learnt} learnt) of {card.bytes:,} bytes"
    )
    first = f"; the first: {stats.first_error}" if stats.first_error else ""
    print(f"lines skipped: {card.skipped:,}{first}")


def _show(options: argparse.Namespace, sources: list[str], tokenizer) -> None:
    from rwkv7_jax.data.loading import batch_at, data_hash, token_stream

    for name in ("show", "length"):
        if getattr(options, name) < 1:
            raise ValueError(f"data: `--{name}` must be at least 1; got {getattr(options, name)}.")
    stream = token_stream(sources, tokenizer, on_bad=options.on_bad)
    batch = batch_at(
        stream,
        0,
        batch_size=options.show,
        length=options.length,
        seed=options.seed,
        packing=options.packing,
    )
    print(
        f"{len(stream.starts) - 1:,} documents, {len(stream):,} {tokenizer.name} tokens, "
        f"{stream.count_in_loss():,} learnt; hash {data_hash(stream)}\n"
        "[[only read]], learnt; <0> ends a document"
    )
    for number, (tokens, mask) in enumerate(zip(batch.tokens, batch.mask, strict=True), 1):
        text, filling = marked(tokens, mask, tokenizer)
        filled = f", {filling} tokens of filling" if filling else ""
        print(f"\n--- row {number}: {int(mask.sum())} targets learnt{filled}\n{text}")


def marked(tokens: np.ndarray, mask: np.ndarray, tokenizer) -> tuple[str, int]:
    """A row's text with what is only read in double brackets, and its filling.

    The first token of a row is an input alone, never a target. Filling is tokens 0 at the end that
    do not count.
    """
    learnt = np.concatenate([[False], mask > 0])
    used = len(tokens) - int(np.argmax((tokens[::-1] != 0) | learnt[::-1]))
    edges = np.flatnonzero(np.diff(learnt[:used])) + 1
    text = ""
    for ids in np.split(np.arange(used), edges):
        spelt = b"".join(tokenizer.token_bytes(int(i)) or b"<%d>" % i for i in tokens[ids])
        piece = spelt.decode("utf-8", errors="replace")
        text += piece if learnt[ids[0]] else f"[[{piece}]]"
    return text, len(tokens) - used
