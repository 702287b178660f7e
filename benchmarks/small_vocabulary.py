"""A small vocabulary for a small model: all bytes, and the entries of World that a text uses most.

    python -m benchmarks.small_vocabulary runs/debian.jsonl runs/english.txt --size 4096

Half of the parameters of a small model would be the embedding and the head of World's 65,536 ids.
Reads every tenth document of a file with lines of {"text": ...}, counts World's tokens in them, and
writes a vocabulary file that every program takes (`--config.data.vocabulary`, `--vocabulary`). Id 0
ends a text; the others are in World's order. Prints how many bytes a token has on average.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

import rwkv7_jax as rwkv
from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.local_paths import check_target

# Of so many documents one is read.
_EVERY = 10
# The bytes, and the id that ends a text.
_FEWEST = 257


def read_documents(path: Path) -> Iterator[str]:
    """Reads every tenth document of a file.

    Raises:
        ValueError: a line is no object with a "text".
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number % _EVERY:
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, KeyError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{path}:{number}: must be an object with a "text".')
            yield text


def small_vocabulary(documents: Iterable[str], size: int) -> rwkv.Tokenizer:
    """Selects the entries of World that documents use most.

    Args:
        documents: texts like those that a model will read.
        size: ids of the vocabulary, with the one that ends a text.

    Raises:
        ValueError: the size is too small for all bytes, or World has fewer entries.
    """
    world = rwkv.Tokenizer.world()
    if not _FEWEST <= size <= world.largest_id + 1:
        raise ValueError(
            f"small_vocabulary: `size` must be from {_FEWEST} to {world.largest_id + 1:,}; "
            f"got {size:,}."
        )
    counts = np.zeros(world.vocab_size, np.int64)
    for text in documents:
        counts += np.bincount(world.encode(text), minlength=world.vocab_size)
    # World's first ids are the bytes, which have to stay whatever their counts are.
    counts[1:_FEWEST] = counts.max() + 1
    counts[0] = counts[world.largest_id + 1 :] = -1
    # Of entries with equal counts the first ones are selected.
    order = np.argsort(-counts, kind="stable")
    chosen = np.sort(order[: size - 1])
    entries = dict(zip(itertools.count(1), map(world.token_bytes, chosen)))
    return rwkv.Tokenizer(entries, vocab_size=size, name="small", kind="file")


def main() -> None:
    """Writes the vocabulary, and prints the bytes of a token."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path, help="TEXT.jsonl")
    parser.add_argument("target", type=Path, help="OUT.txt")
    parser.add_argument("--size", type=int, default=4096, help="ids")
    options = parser.parse_args()
    try:
        check_target(options.target, "`target`")
        if options.target.is_dir():
            raise ValueError(f"`target` must be a file; {options.target} is a folder.")
        documents = list(read_documents(options.text))
        if not documents:
            raise ValueError(f"{options.text} has fewer than {_EVERY} documents.")
        tokenizer = small_vocabulary(documents, options.size)
        options.target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(options.target) as file:
            file.write(tokenizer.file_text().encode())
    except (ValueError, OSError) as error:
        sys.exit(f"small_vocabulary: {error}")
    # A part of the documents that were counted is enough for the mean.
    shown = documents[::_EVERY] or documents
    size = sum(len(text.encode()) for text in shown)
    tokens = sum(len(tokenizer.encode(text)) for text in shown)
    print(f"wrote {options.target}: {size / tokens:.2f} bytes per token")


if __name__ == "__main__":
    main()
