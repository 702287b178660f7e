"""Loading of paths as a token stream and as batches."""

import functools
import itertools
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rwkv7_jax.checks import (
    check_choice,
    check_count,
    check_number,
    check_tokenizer,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.batching import (
    batch_at,
    batches_from,
    check_batch_sizes,
    check_choices,
    check_long_enough,
    host_rows,
    left_out,
    windows,
)
from rwkv7_jax.data.builtin_corpora import is_built_in
from rwkv7_jax.data.choices import ON_BAD, SPLITS, Split
from rwkv7_jax.data.documents import Document, held_out_threshold
from rwkv7_jax.data.jsonl import ReadStats
from rwkv7_jax.data.readers import documents, warn_of_skipped
from rwkv7_jax.data.token_cache import (
    cache_file,
    check_vocabulary,
    open_cache,
    split_by_position,
)
from rwkv7_jax.data.token_streams import (
    TokenArray,
    TokenStream,
    check_flat_ids,
    data_hash,
)
from rwkv7_jax.local_paths import local_path
from rwkv7_jax.text.tokenizer import Tokenizer

__all__ = [
    "batch_at",
    "batches_from",
    "data_hash",
    "host_rows",
    "left_out",
    "packed",
    "token_stream",
    "windows",
]

# What `token_stream` and `packed` accept.
PathsOrIds = str | Path | Sequence[str | Path] | np.ndarray | TokenStream

# `readers.documents` with the options of the call; takes a source and its statistics.
_Read = Callable[..., Iterator[Document]]


def _encode(selected: Iterable[Document], tokenizer: Tokenizer) -> TokenArray:
    """Encodes documents into one array in memory."""
    # Starts with an empty array, for when there are no documents.
    pieces = [np.zeros(0, tokenizer.dtype)]
    # One flag per piece; the full mask is built only if needed.
    flags = [True]
    sizes = []
    for document in selected:
        size = 0
        for ids, in_loss in document.ids(tokenizer):
            pieces.append(ids)
            flags.append(in_loss)
            size += len(ids)
        sizes.append(size)
    mask = None
    if not all(flags):
        lengths = [len(ids) for ids in pieces]
        mask = np.repeat(np.array(flags, np.uint8), lengths)
    ends = np.cumsum(sizes, dtype=int)
    starts = np.concatenate([[0], ends])
    return TokenArray(np.concatenate(pieces), mask, starts)


def _open(
    path: str | Path, tokenizer: Tokenizer, read: _Read, split: Split, held_out: float
) -> TokenStream:
    """Maps a cache, or reads the documents of any other source."""
    # `Path("")` is the current folder and would read everything below it.
    if isinstance(path, str) and not is_built_in(path):
        path = local_path(path, "token_stream: `source`")
    cache = cache_file(path)
    if cache is not None:
        return open_cache(cache, tokenizer, split=split, held_out=held_out)
    return _encode_split(path, tokenizer, read, split, held_out)


def _encode_split(
    source: str | Path, tokenizer: Tokenizer, read: _Read, split: Split, held_out: float
) -> TokenStream:
    """Reads one split of the documents of a source into memory."""
    stats = ReadStats()
    selected = read(source, stats=stats)
    # A single document is split by position, so two must be read to know.
    first_two = list(itertools.islice(selected, 2))
    selected = itertools.chain(first_two, selected)
    by_document = split != "all" and len(first_two) != 1
    if by_document:
        threshold = held_out_threshold(held_out)
        wants_held_out = split == "held_out"
        selected = (
            document
            for document in selected
            if (document.content_hash() < threshold) == wants_held_out
        )
    tokens = _encode(selected, tokenizer)
    # Points at the caller of `token_stream`.
    warn_of_skipped(source, stats, stacklevel=5)
    if by_document:
        return TokenStream.of_array(tokens)
    return split_by_position(tokens, split, held_out)


def _holds_document(path: str | Path, read: _Read) -> bool:
    """Returns whether a source that was read without an error has any document."""
    if cache_file(path) is not None:
        return True
    return next(read(path, stats=ReadStats()), None) is not None


def _on_host(source: Any) -> Any:
    """Copies an array of JAX to the host; returns any other source unchanged."""
    return np.asarray(source) if isinstance(source, jax.Array) else source


def _check_source(source: Any, tokenizer: Any, held_out: Any) -> None:
    """Raises unless a source, a tokenizer and a held-out share are valid."""
    check_tokenizer(tokenizer, "encode", "vocab_size")
    check_number(held_out, 0, 1, "`held_out`")
    if isinstance(source, np.ndarray):
        check_flat_ids(source, "`source`")
        check_vocabulary(source, tokenizer.vocab_size, "source")
    if isinstance(source, str | Path | np.ndarray | TokenStream):
        return
    if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        raise TypeError(
            "`source` must be a path, a list of paths, an array of ids or a stream; "
            f"got {type(source).__name__}."
        )
    # An iterator can be consumed only once, so it is not checked here.
    if not isinstance(source, Sequence):
        return
    if not source:
        raise ValueError("`source` must name something to read; got an empty list.")
    for path in source:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(
                f"`source` must be a list of paths; got {type(path).__name__} in it."
            )


def token_stream(
    source: PathsOrIds,
    tokenizer: Tokenizer,
    *,
    split: str = "all",
    held_out: float = 0.05,
    on_bad: str = "error",
    as_bytes: bool = False,
    encoding: str | None = None,
) -> TokenStream:
    """Opens all ids of `source` as one stream, with an end of text after every document.

    Args:
        source: anything that `readers.documents` reads, a `.bin` file (see `token_cache`; the
            suffix is optional), a list of these, or an array of ids. A stream is returned
            unchanged, regardless of the split.
        tokenizer: encodes documents.
        split: "all", "train" or "held_out". Documents are split by a hash of their bytes. A single
            document, an array, or a .bin file of other tools is split by position: its end is held
            out.
        held_out: the held-out share.
        on_bad: "error" or "skip", for bad lines of .jsonl files; a warning counts them.
        as_bytes: read the bytes of files that are not text or not UTF-8.
        encoding: encoding of text files, such as "gbk"; None for UTF-8.

    Raises:
        TypeError: an array does not hold integers.
        ValueError: the split is unknown, there is nothing to read, a file is not text, a line is
            bad, or an id is outside the vocabulary.
    """
    source = _on_host(source)
    with prefix_errors("token_stream"):
        _check_source(source, tokenizer, held_out)
        check_choice(split, SPLITS, "`split`")
        check_choice(on_bad, ON_BAD, "`on_bad`")
    part = typing.cast(Split, split)
    if isinstance(source, TokenStream):
        return source
    if isinstance(source, np.ndarray):
        array = TokenArray(source, end_of_text=tokenizer.end_of_text)
        return split_by_position(array, part, held_out)
    paths = [source] if isinstance(source, (str, Path)) else list(source)
    read = functools.partial(
        documents, on_bad=on_bad, as_bytes=as_bytes, encoding=encoding
    )
    # A loop, because a comprehension would add a frame and shift the warning's stack level.
    streams = []
    for path in paths:
        streams.append(_open(path, tokenizer, read, part, held_out))
    stream = TokenStream.concatenate(streams)
    if not len(stream):
        names = ", ".join(map(str, paths))
        if part == "all" or not any(_holds_document(path, read) for path in paths):
            raise ValueError(f"token_stream: `{names}` holds no document.")
        raise ValueError(
            f"token_stream: `{names}` has no document in its split {split!r} with a held-out share "
            f"of {held_out}: use another share, or 0 and other text for evaluation."
        )
    return stream


def packed(
    source: PathsOrIds,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    split: str = "all",
    held_out: float = 0.05,
    as_bytes: bool = False,
    encoding: str | None = None,
    start_step: int = 0,
    order: str = "shuffled",
    packing: str = "stream",
    rows: slice = slice(None),
) -> Iterator[Batch]:
    """Yields batches of a source endlessly: tokens [B T+1] int32 and mask [B T].

    The batch of a step depends only on the arguments, so a run may start at any step.

    Args:
        source: a path or built-in corpus, a list of these, or an array of ids, as in
            `token_stream`.
        batch_size: number of rows of the global batch (B).
        length: number of inputs per row (T).
        seed: seed of the order.
        tokenizer: encodes documents; None for World.
        split: "all", "train" or "held_out".
        held_out: the held-out share.
        as_bytes: read the bytes of files that are not text or not UTF-8.
        encoding: encoding of text files; None for UTF-8.
        start_step: step of the first batch.
        order: "shuffled" or "cubic", as in `batch_at`.
        packing: "stream", "documents" or "packed", as in `batch_at`.
        rows: rows of the global batch to build; see `host_rows`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the data cannot be read or is too short.
    """
    if tokenizer is None:
        tokenizer = Tokenizer.world()
    source = _on_host(source)
    with prefix_errors("packed"):
        # Checked before reading, which may take long.
        _check_source(source, tokenizer, held_out)
        check_count(start_step, 0, "`start_step`")
        check_batch_sizes(batch_size, length, seed, rows)
        check_choice(split, SPLITS, "`split`")
        check_choices(order, packing)
    stream = token_stream(
        source,
        tokenizer,
        split=split,
        held_out=held_out,
        as_bytes=as_bytes,
        encoding=encoding,
    )
    with prefix_errors("packed"):
        check_long_enough(
            stream,
            length,
            order=order,
            packing=packing,
            argument="`source`",
        )
    return batches_from(
        stream,
        batch_size=batch_size,
        length=length,
        seed=seed,
        start_step=start_step,
        order=order,
        packing=packing,
        rows=rows,
    )
