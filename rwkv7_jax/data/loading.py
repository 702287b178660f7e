"""From a path to batches whose order is a pure function of the seed and the step."""

import functools
import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.batching import batch_at, host_rows, left_out, windows
from rwkv7_jax.data.documents import held_out_threshold
from rwkv7_jax.data.jsonl import ReadStats
from rwkv7_jax.data.readers import documents
from rwkv7_jax.data.token_cache import SPLITS, check_vocabulary, open_cache, split_by_position
from rwkv7_jax.data.token_streams import TokenArray, TokenStream, data_hash
from rwkv7_jax.text.tokenizer import Tokenizer

__all__ = [
    "batch_at",
    "data_hash",
    "host_rows",
    "left_out",
    "packed",
    "token_stream",
    "windows",
]

Source = str | Path | Sequence[str | Path] | np.ndarray | TokenStream


def _tokenized(
    source: str | Path, tokenizer: Tokenizer, *, split: str, held_out: float, on_bad: str
) -> TokenStream:
    """One part of the documents of a source, in memory."""
    reading, ids, runs, sizes = ReadStats(), [], [], []
    found = documents(source, on_bad=on_bad, reading=reading)
    first = list(itertools.islice(found, 2))
    whole = split == "all" or len(first) == 1
    below = held_out_threshold(held_out)
    for document in itertools.chain(first, found):
        if not whole and (document.key() < below) != (split == "held_out"):
            continue
        size = 0
        for piece, learnt in document.ids(tokenizer):
            ids.append(piece)
            runs.append(learnt)
            size += len(piece)
        sizes.append(size)
    if reading.skipped:
        left = f"{reading.skipped} lines of {source} were skipped"
        warnings.warn(f"{left}; the first: {reading.first}", stacklevel=4)
    learnt = None if all(runs) else np.repeat(np.array(runs, np.uint8), [len(p) for p in ids])
    row = np.concatenate([np.zeros(0, np.uint16), *ids])
    tokens = TokenArray(row, learnt, np.concatenate([[0], np.cumsum(sizes, dtype=int)]))
    return split_by_position(tokens, split, held_out) if whole else TokenStream.whole(tokens)


def token_stream(
    source: Source,
    tokenizer: Tokenizer,
    *,
    split: str = "all",
    held_out: float = 0.05,
    on_bad: str = "error",
) -> TokenStream:
    """All ids of `source` in one row, token 0 behind every document.

    Args:
        source: what `sources.documents` reads, a `.bin` file (see `token_cache`), several of these,
            or an array of ids; a stream is given back as it is, whatever the split.
        tokenizer: makes ids of documents.
        split: "all"; or "train" and "held_out", which part whole documents by a hash of their bytes
            (a single document, an array, or a .bin file of other tools, by position: its end is
            held out).
        held_out: the share held out.
        on_bad: "error" or "skip", for bad lines of .jsonl files; a warning counts them.

    Raises:
        TypeError: an array of something else than integers.
        ValueError: an unknown split, nothing to read, a bad line, or an id outside the vocabulary.
    """
    if split not in SPLITS:
        raise ValueError(f"token_stream: `split` must be one of {SPLITS}; got {split!r}.")
    if isinstance(source, TokenStream):
        return source
    if isinstance(source, np.ndarray):
        if not np.issubdtype(source.dtype, np.integer):
            raise TypeError(f"token_stream: `source` must hold integers; got {source.dtype}.")
        check_vocabulary(source, tokenizer.vocab_size, "source")
        return split_by_position(TokenArray(source), split, held_out)
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    choices = {"split": split, "held_out": held_out}
    streams = [
        open_cache(one, tokenizer, **choices)
        if Path(one).suffix in (".bin", ".idx")
        else _tokenized(one, tokenizer, on_bad=on_bad, **choices)
        for one in sources
    ]
    stream = TokenStream.joined(streams)
    if not len(stream):
        names = ", ".join(map(str, sources))
        raise ValueError(
            f"token_stream: `{names}` has no document in its part {split!r}, of a share {held_out} "
            "held out: take another share, or 0 and other text for evaluation."
        )
    return stream


def packed(
    source: Source,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    split: str = "all",
    held_out: float = 0.05,
    start_step: int = 0,
    order: str = "shuffled",
    packing: str = "stream",
    rows: slice = slice(None),
) -> Iterator[Batch]:
    """Batches without end, from `start_step` on; see `token_stream` and `batch_at`.

    With packing "documents" a warning says how much of longer documents is left out.
    """
    tokenizer = tokenizer or Tokenizer.world()
    stream = token_stream(source, tokenizer, split=split, held_out=held_out)
    batch = functools.partial(
        batch_at,
        stream,
        batch_size=batch_size,
        length=length,
        seed=seed,
        order=order,
        packing=packing,
        rows=rows,
    )
    batch(start_step)
    if packing == "documents" and (cut := left_out(stream, length))[0]:
        warnings.warn(
            f"{cut[0]:,} documents are longer than {length + 1} tokens: {cut[1]:,} of "
            f"{len(stream):,} tokens are never read",
            stacklevel=2,
        )
    return map(batch, itertools.count(start_step))
