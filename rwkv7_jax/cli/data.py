"""`rwkv7 data`: tokenizes text into a cache, or shows rows as training sees them."""

import argparse
from pathlib import Path

import numpy as np

from rwkv7_jax.cli.arguments import (
    MOST_ROWS,
    MOST_TOKENS,
    integer,
    refuse_inputs,
    target_path,
)
from rwkv7_jax.cli.inputs import add_vocabulary_option
from rwkv7_jax.cli.summary import COMMANDS
from rwkv7_jax.data.builtin_corpora import BUILT_IN
from rwkv7_jax.data.choices import ON_BAD, PACKINGS
from rwkv7_jax.data.loading import batch_at, data_hash, token_stream
from rwkv7_jax.data.readers import ReadStats
from rwkv7_jax.data.row_preview import preview_row
from rwkv7_jax.data.token_cache import (
    SUFFIXES,
    CacheMetadata,
    cache_file,
    read_card,
    write_cache,
)
from rwkv7_jax.local_paths import local_path, split_paths
from rwkv7_jax.runs.monitoring.progress_bar import byte_progress
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabularies import NAMES, load_vocabulary

_SOURCE_HELP = (
    "a .jsonl or text file, a folder, a built-in text, or a comma-separated list"
)


def add_data_command(subparsers) -> None:
    """Adds the parser of `data` to those of `rwkv7`."""
    parser = subparsers.add_parser(
        "data",
        help=COMMANDS["data"],
        usage="%(prog)s [-h] SOURCE OUT [options]  or  %(prog)s --show N PATH [options]",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help=_SOURCE_HELP)
    add(
        "target",
        metavar="OUT",
        nargs="?",
        type=target_path,
        help="output: OUT.bin and the files next to it; omit with --show",
    )
    add_vocabulary_option(parser, "world, or that of a .bin file")
    add(
        "--on-bad",
        choices=ON_BAD,
        default="error",
        help="handling of bad lines (%(default)s)",
    )
    add("--encoding", help="encoding of the text, such as gbk or utf-16 (UTF-8)")
    add(
        "--as-bytes",
        action="store_true",
        help="read binary files and files that are not UTF-8 as bytes",
    )
    add(
        "--show",
        type=integer(1, MOST_ROWS),
        metavar="N",
        help="print N rows of PATH and write nothing",
    )
    add(
        "--length",
        type=integer(1, MOST_TOKENS),
        default=128,
        help="with --show: tokens per row (%(default)s)",
    )
    add(
        "--packing",
        choices=PACKINGS,
        default="stream",
        help="with --show: packing of documents into rows (%(default)s)",
    )
    add(
        "--seed",
        type=integer(0),
        default=0,
        help="with --show: seed of the row order (%(default)s)",
    )
    parser.set_defaults(run=run_data)


def run_data(options: argparse.Namespace) -> str:
    """Writes a cache and describes it, or formats rows."""
    sources = []
    for entry in split_paths(options.source, "data: `SOURCE`"):
        if entry not in BUILT_IN:
            entry = str(local_path(entry, "data: `SOURCE`"))
        sources.append(entry)
    if not sources:
        raise ValueError("data: `SOURCE` must name a text; got none.")
    if options.show is None and options.target is None:
        raise ValueError("data: `OUT` must be given, or `--show`; got neither.")
    if options.show is not None and options.target is not None:
        raise ValueError(
            "data: `OUT` must be left out with `--show`, which writes nothing; got "
            f"{options.target}."
        )
    tokenizer = _tokenizer(options.vocabulary, sources)
    if options.show is not None:
        return _rows(options, sources, tokenizer)
    return _write(options, sources, tokenizer)


def _tokenizer(vocabulary: str | None, sources: list[str]) -> Tokenizer:
    """Returns the tokenizer of `--vocabulary`, or of the first cache, or World's."""
    if vocabulary is not None:
        return load_vocabulary(vocabulary, argument="data: `--vocabulary`")
    # With another vocabulary, the ids of a cache would decode to other text.
    for source in sources:
        cache = cache_file(source)
        if cache is None:
            continue
        card = read_card(cache)
        if card is None:
            continue
        if card.vocabulary not in NAMES:
            raise ValueError(
                f"data: `--vocabulary` must name the vocabulary file that {source} was made with "
                f"({card.vocabulary}); got none."
            )
        return load_vocabulary(card.vocabulary)
    return Tokenizer.world()


def _write(
    options: argparse.Namespace, sources: list[str], tokenizer: Tokenizer
) -> str:
    """Tokenizes the sources into one cache."""
    target = _cache_target(options.target, sources)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Progress is in bytes, because the number of tokens is not known yet.
    with byte_progress("tokenizing") as progress:
        card, stats = write_cache(
            sources,
            target,
            tokenizer,
            on_bad=options.on_bad,
            as_bytes=options.as_bytes,
            encoding=options.encoding,
            progress=progress,
        )
    return _describe_cache(target, card, stats, tokenizer.name)


def _cache_target(out: str, sources: list[str]) -> Path:
    """Returns the path of a cache's ids.

    Raises:
        ValueError: a source is a cache, or would be overwritten.
    """
    for source in sources:
        if cache_file(source) is not None:
            raise ValueError(
                f"data: `SOURCE` must be text; got the token cache {source}."
            )
    target = Path(out)
    # `with_suffix` would remove the ".5" of a name such as "v1.5".
    if target.suffix != ".bin":
        target = Path(f"{target}.bin")
    for suffix in SUFFIXES:
        refuse_inputs("data: `OUT`", target.with_suffix(suffix), {"SOURCE": sources})
    return target


def _describe_cache(
    target: Path, card: CacheMetadata, stats: ReadStats, vocabulary: str
) -> str:
    """Describes the content of a cache, and the skipped lines and files."""
    in_loss = "all" if card.learnt == card.tokens else f"{card.learnt:,}"
    lines = [
        f"{target}: {card.documents:,} documents, {card.tokens:,} {vocabulary} tokens "
        f"({in_loss} in the loss) of {card.bytes:,} bytes"
    ]
    line = f"lines skipped: {card.skipped:,}"
    if stats.first_error:
        line += f"; the first: {stats.first_error}"
    lines.append(line)
    if stats.passed_over:
        lines.append(
            f"files skipped: {stats.passed_over:,} (hidden files, pictures, editor backups, data "
            "cards, broken or second links)"
        )
    return "\n".join(lines)


def _rows(options: argparse.Namespace, sources: list[str], tokenizer: Tokenizer) -> str:
    """Formats rows of the first batch."""
    stream = token_stream(
        sources,
        tokenizer,
        on_bad=options.on_bad,
        as_bytes=options.as_bytes,
        encoding=options.encoding,
    )
    batch = batch_at(
        stream,
        0,
        batch_size=options.show,
        length=options.length,
        seed=options.seed,
        packing=options.packing,
    )
    ending = "".join(f"; <{number}> ends a document" for number in tokenizer.stop_ids)
    parts = [
        f"{len(stream.starts) - 1:,} documents, {len(stream):,} {tokenizer.name} tokens, "
        f"{stream.count_in_loss():,} in the loss; hash {data_hash(stream)}\n"
        f"[[not in the loss]], in the loss{ending}"
    ]
    tokens = np.asarray(batch.tokens)
    mask = np.asarray(batch.mask)
    for row in range(len(tokens)):
        text, padding = preview_row(tokens[row], mask[row], tokenizer)
        title = f"row {row + 1}: {int(mask[row].sum())} targets in the loss"
        if padding:
            title += f", {padding} tokens of padding"
        parts.append(f"--- {title}\n{text}")
    return "\n\n".join(parts)
