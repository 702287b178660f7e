"""`rwkv7 data`: text becomes ids on the disk, and is shown as training sees it."""

import argparse
from pathlib import Path

import numpy as np

from rwkv7_jax.data.choices import ON_BAD, PACKINGS
from rwkv7_jax.data.loading import batch_at, data_hash, token_stream
from rwkv7_jax.data.readers import size_of
from rwkv7_jax.data.row_preview import preview_row
from rwkv7_jax.data.token_cache import read_card, write_cache
from rwkv7_jax.runs.progress_bar import ProgressBar
from rwkv7_jax.text.tokenizer import Tokenizer

_SOURCE_HELP = (
    "a .jsonl or text file, a folder, a built-in text, or several with commas"
)

_CACHE_SUFFIXES = (".bin", ".idx")


def add_data_command(subparsers) -> None:
    """Adds the parser of `data` to those of `rwkv7`."""
    parser = subparsers.add_parser(
        "data",
        help="turn text into ids on the disk, or show rows of either",
        usage="%(prog)s [-h] SOURCE OUT [options]  or  %(prog)s --show N PATH [options]",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help=_SOURCE_HELP)
    add(
        "target",
        metavar="OUT",
        nargs="?",
        help="OUT.bin and the files next to it; left out with --show",
    )
    add("--vocabulary", choices=("world", "bytes"), help="world; of a .bin its own")
    add("--on-bad", choices=ON_BAD, default="error", help="bad lines (%(default)s)")
    add("--show", type=int, metavar="N", help="print N rows of PATH and write nothing")
    add(
        "--length",
        type=int,
        default=128,
        help="tokens of a row that is shown (%(default)s)",
    )
    add("--packing", choices=PACKINGS, default="stream", help="(%(default)s)")
    add("--seed", type=int, default=0, help="of the rows that are shown (%(default)s)")
    parser.set_defaults(run=run_data)


def run_data(options: argparse.Namespace) -> None:
    """Writes a cache, or prints rows."""
    sources = [part for part in options.source.split(",") if part]
    tokenizer = _tokenizer(options.vocabulary, sources)
    if options.show is not None:
        _show(options, sources, tokenizer)
    elif options.target is None:
        raise ValueError("data: `OUT` must be given, or `--show`; got neither.")
    else:
        _write(options, sources, tokenizer)


def _tokenizer(vocabulary: str | None, sources: list[str]) -> Tokenizer:
    """Returns the tokenizer that was asked for, else that of the first cache, else World's."""
    if vocabulary is None:
        vocabulary = "world"
        # A cache knows its vocabulary; ids of another one would be other text.
        for source in sources:
            card = read_card(source) if source.endswith(_CACHE_SUFFIXES) else None
            if card is not None:
                vocabulary = card.vocabulary
                break
    return Tokenizer.bytes() if vocabulary == "bytes" else Tokenizer.world()


def _write(
    options: argparse.Namespace, sources: list[str], tokenizer: Tokenizer
) -> None:
    """Tokenizes the sources into one cache."""
    for source in sources:
        if source.endswith(_CACHE_SUFFIXES):
            raise ValueError(f"data: `SOURCE` must be text; got the ids of {source}.")
    path = Path(options.target)
    # `with_suffix` would cut the ".5" of a name such as "v1.5".
    if path.suffix != ".bin":
        path = Path(f"{path}.bin")
    path.parent.mkdir(parents=True, exist_ok=True)
    # In bytes of text: how many tokens there will be is not known yet.
    bar = ProgressBar(sum(map(size_of, sources)), "tokenizing")

    def report(done: int, total: int) -> None:
        bar.update(done, f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB")

    # The bar is closed before an error is printed, so that the error has a line of its own.
    try:
        card, stats = write_cache(
            sources, path, tokenizer, on_bad=options.on_bad, progress=report
        )
    finally:
        bar.close()
    in_loss = "all" if card.learnt == card.tokens else f"{card.learnt:,}"
    print(
        f"{path}: {card.documents:,} documents, {card.tokens:,} {card.vocabulary} tokens "
        f"({in_loss} in the loss) of {card.bytes:,} bytes"
    )
    line = f"lines skipped: {card.skipped:,}"
    if stats.first_error:
        line += f"; the first: {stats.first_error}"
    print(line)


def _show(
    options: argparse.Namespace, sources: list[str], tokenizer: Tokenizer
) -> None:
    """Prints rows of the first batch."""
    for name in ("show", "length"):
        value = getattr(options, name)
        if value < 1:
            raise ValueError(f"data: `--{name}` must be at least 1; got {value}.")
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
        f"{stream.count_in_loss():,} in the loss; hash {data_hash(stream)}\n"
        "[[not in the loss]], in the loss; <0> ends a document"
    )
    tokens = np.asarray(batch.tokens)
    mask = np.asarray(batch.mask)
    for row in range(len(tokens)):
        text, padding = preview_row(tokens[row], mask[row], tokenizer)
        title = f"row {row + 1}: {int(mask[row].sum())} targets in the loss"
        if padding:
            title += f", {padding} tokens of padding"
        print(f"\n--- {title}\n{text}")
