"""Batches of a token stream, as a pure function of the seed and the step.

A run can therefore resume without a saved position on any number of hosts, and batches may be
prefetched, delayed or repeated.
"""

import functools
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rwkv7_jax.checks import (
    check_choice,
    check_count,
    check_instance,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.choices import ORDERS, PACKINGS
from rwkv7_jax.data.packed_documents import pack_documents
from rwkv7_jax.data.shuffling import cubic_windows, shuffled, shuffled_windows
from rwkv7_jax.data.token_streams import TokenStream, as_stream

IdsOrStream = np.ndarray | TokenStream

# The first position and the number of ids of a row in the stream.
Span = tuple[int, int]


def host_rows(batch_size: int, host: int, hosts: int) -> slice:
    """Returns the rows of the global batch that one host builds.

    Args:
        batch_size: number of rows of the global batch (B).
        host: index of the host, from 0.
        hosts: number of hosts; must divide the batch.

    Raises:
        TypeError: a number is not an integer.
        ValueError: `hosts` does not divide the batch, or `host` is out of range.
    """
    with prefix_errors("host_rows"):
        check_count(batch_size, 1, "`batch_size`")
        check_count(host, 0, "`host`")
        check_count(hosts, 1, "`hosts`")
    if batch_size % hosts or host >= hosts:
        raise ValueError(
            f"host_rows: `hosts` must divide the batch of {batch_size} rows and `host` be one of "
            f"them; got {hosts} and {host}."
        )
    share = batch_size // hosts
    first = host * share
    return slice(first, first + share)


def _fill_rows(
    stream: TokenStream,
    spans: Sequence[Span],
    length: int,
) -> Batch:
    """Builds one row from each span of the stream.

    Args:
        stream: the token stream.
        spans: spans of at most `length` + 1 ids.
        length: number of inputs per row (T). Shorter rows are padded with token 0, which is not in
            the loss.
    """
    tokens = np.zeros((len(spans), length + 1), np.int32)
    mask = np.zeros((len(spans), length), np.float32)
    for row, (first, size) in enumerate(spans):
        # Fills views of the batch in place, so no row is copied.
        stream.fill(first, tokens[row, :size], mask[row, : size - 1])
    return Batch(tokens=tokens, mask=mask)


def row_sizes(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Counts the tokens of each row without its padding: the zeros at its end outside the loss.

    Args:
        tokens: [B T+1] ids.
        mask: [B T] loss weights of the targets.
    """
    is_content = tokens != 0
    is_content[:, 1:] |= mask > 0
    padding = np.argmax(is_content[:, ::-1], axis=1)
    return np.where(is_content.any(axis=1), tokens.shape[1] - padding, 0)


def _document_spans(
    stream: TokenStream, documents: Sequence[int] | np.ndarray, length: int
) -> list[Span]:
    """Returns the spans of some documents, truncated to the length of a row."""
    numbers = np.asarray(documents)
    starts = stream.starts[numbers]
    ends = stream.starts[numbers + 1]
    sizes = np.minimum(ends - starts, length + 1)
    return list(zip(starts.tolist(), sizes.tolist(), strict=True))


def _fill_packed_rows(stream: TokenStream, rows: Sequence[int], length: int) -> Batch:
    """Builds packed rows by their indices."""
    packed = pack_documents(stream, length)
    tokens = np.zeros((len(rows), length + 1), np.int32)
    mask = np.zeros((len(rows), length), np.float32)
    segments = np.full((len(rows), packed.sequences), length, np.int32)
    for row, number in enumerate(rows):
        begin = 0
        spans = _document_spans(stream, packed.row(number), length)
        for place, (first, size) in enumerate(spans):
            end = begin + size
            # A document's last id has no target: the next id belongs to the next document.
            stream.fill(first, tokens[row, begin:end], mask[row, begin : end - 1])
            segments[row, place] = begin
            begin = end
    return Batch(tokens=tokens, mask=mask, segments=segments)


def check_documents(stream: TokenStream, argument: str = "`stream`") -> None:
    """Checks that a stream has a document for packing "documents" or "packed".

    Raises:
        ValueError: no document has an input and a target.
    """
    if not len(stream.documents):
        raise ValueError(
            f"{argument} must have a document of at least 2 tokens; got none."
        )


def fewest_windows(order: str) -> int:
    """Returns the minimum number of windows in a stream for an order of packing "stream"."""
    # The cubic order leaves out the last window and needs a prime number of others, at least two.
    return 3 if order == "cubic" else 2


def check_long_enough(
    stream: TokenStream,
    length: int,
    *,
    order: str,
    packing: str,
    argument: str = "`stream`",
) -> None:
    """Checks that a stream is long enough to cut rows from it.

    Args:
        stream: the token stream.
        length: number of inputs per row (T).
        order: as in `batch_at`.
        packing: as in `batch_at`.
        argument: the argument that gave the ids, in backticks; the message begins with it.

    Raises:
        ValueError: the stream is too short.
    """
    if packing != "stream":
        check_documents(stream, argument)
        return
    least = fewest_windows(order) * length
    if len(stream) < least:
        raise ValueError(
            f"{argument} must have at least {least} tokens; got {len(stream)}, "
            f"too few for `length` {length}."
        )


def batch_at(
    stream: IdsOrStream,
    step: int,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    order: str = "shuffled",
    packing: str = "stream",
    rows: slice = slice(None),
) -> Batch:
    """Builds the batch of one step: tokens [B T+1] int32 and mask [B T], 1 where a target counts.

    * Packing "stream" cuts rows from the concatenated documents, without padding or omissions. As
      in RWKV's own training, the state carries over from one document to the next in the same row,
      and a row may begin inside a document, or between a prompt and its answer.
    * Packing "documents" gives each document its own row. Nothing leaks between documents, every
      row begins with a document, and tokens beyond the first T+1 of a document are never read.
    * Packing "packed" packs these same documents into full rows. `segments` has their starts, so
      that each is read as if it had its own row. Which documents share a row depends only on the
      documents and T, not on the seed.

    Args:
        stream: from `token_stream`, or an array of ids.
        step: the step, from 0.
        batch_size: number of rows of the global batch (B).
        length: number of inputs per row (T); a row has T+1 tokens.
        seed: seed of the order.
        order: "shuffled": each window or document comes once per epoch, in an order drawn from
            (seed, epoch), and the windows' borders shift between epochs. "cubic": the order of
            RWKV's own trainer, for packing "stream"; ignores the seed.
        packing: "stream", "documents" or "packed".
        rows: rows of the global batch to build; see `host_rows`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the order or packing is unknown, or the stream is too short.
    """
    with prefix_errors("batch_at"):
        stream = as_stream(stream, "`stream`")
        check_choices(order, packing)
        check_count(step, 0, "`step`")
        check_batch_sizes(batch_size, length, seed, rows)
        check_long_enough(stream, length, order=order, packing=packing)
    # Samples are numbered across all steps; a host builds only those of its rows.
    first = step * batch_size
    samples = range(first, first + batch_size)[rows]
    if packing == "documents":
        picked = shuffled(samples, seed=seed, count=len(stream.documents))
        spans = _document_spans(stream, stream.documents[picked], length)
        return _fill_rows(stream, spans, length)
    if packing == "packed":
        count = pack_documents(stream, length).rows
        picked = shuffled(samples, seed=seed, count=count)
        return _fill_packed_rows(stream, picked, length)
    if order == "cubic":
        firsts = cubic_windows(samples, tokens=len(stream), length=length)
    else:
        firsts = shuffled_windows(
            samples,
            seed=seed,
            tokens=len(stream),
            length=length,
        )
    return _fill_rows(stream, [(first, length + 1) for first in firsts], length)


def check_batch_sizes(batch_size: Any, length: Any, seed: Any, rows: Any) -> None:
    """Checks the sizes, the seed and the rows of batches.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a size is below 1, or the seed is negative.
    """
    check_count(batch_size, 1, "`batch_size`")
    check_count(length, 1, "`length`")
    check_count(seed, 0, "`seed`")
    check_instance(rows, slice, "`rows`")


def batches_from(
    stream: TokenStream,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    start_step: int = 0,
    order: str = "shuffled",
    packing: str = "stream",
    rows: slice = slice(None),
) -> Iterator[Batch]:
    """Yields the batches of all steps from `start_step` on, endlessly.

    With packing "documents" or "packed", warns how many tokens of longer documents are left out.

    Args:
        stream: from `token_stream`.
        batch_size: number of rows of the global batch (B).
        length: number of inputs per row (T).
        seed: seed of the order.
        start_step: step of the first batch.
        order: as in `batch_at`.
        packing: as in `batch_at`.
        rows: rows of the global batch to build; see `host_rows`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the order or packing is unknown, a number is out of range, or the stream is too
            short.
    """
    make = functools.partial(
        batch_at,
        stream,
        batch_size=batch_size,
        length=length,
        seed=seed,
        order=order,
        packing=packing,
        rows=rows,
    )
    # Builds one batch now, so that errors are raised here, not at the first `next` in a thread.
    make(start_step)
    if packing != "stream":
        documents, tokens = left_out(stream, length)
        if documents:
            warnings.warn(
                f"{documents:,} documents are longer than {length + 1} tokens: {tokens:,} of "
                f"{len(stream):,} tokens are never read",
                stacklevel=3,
            )
    return map(make, itertools.count(start_step))


def check_choices(order: str, packing: str) -> None:
    """Checks an order, a packing and their combination.

    Raises:
        ValueError: one is unknown, or they cannot be combined.
    """
    check_choice(order, ORDERS, "`order`")
    check_choice(packing, PACKINGS, "`packing`")
    if order == "cubic" and packing != "stream":
        raise ValueError(
            f'`order` must be "shuffled" where `packing` is "{packing}"; got "cubic".'
        )


def left_out(stream: IdsOrStream, length: int) -> tuple[int, int]:
    """Counts the documents that are longer than a row, and their tokens that are never read.

    Does not apply to packing "stream", which reads all tokens.
    """
    with prefix_errors("left_out"):
        stream = as_stream(stream, "`stream`")
        check_count(length, 1, "`length`")
    sizes = np.diff(stream.starts)
    excess = sizes - (length + 1)
    too_long = excess > 0
    return int(too_long.sum()), int(excess[too_long].sum())


def windows(
    stream: IdsOrStream,
    length: int,
    count: int,
    *,
    packing: str = "stream",
) -> Batch:
    """Builds one batch for evaluation, with at most `count` rows spread evenly over the stream.

    Args:
        stream: as in `batch_at`.
        length: number of inputs per row (T).
        count: maximum number of rows.
        packing: as in `batch_at`, but "packed" is the same as "documents", one document per row.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the stream is shorter than one window, or the packing is unknown.
    """
    with prefix_errors("windows"):
        stream = as_stream(stream, "`stream`")
        check_choice(packing, PACKINGS, "`packing`")
        check_count(length, 1, "`length`")
        check_count(count, 1, "`count`")
        if packing != "stream":
            check_documents(stream)
        elif len(stream) <= length:
            raise ValueError(
                f"`stream` must have more than {length} tokens; got {len(stream)}."
            )
    if packing != "stream":
        rows = min(count, len(stream.documents))
        places = np.linspace(0, len(stream.documents) - 1, rows).astype(int)
        spans = _document_spans(stream, stream.documents[places], length)
        return _fill_rows(stream, spans, length)
    # Windows do not overlap, so a short stream gives fewer rows.
    most = (len(stream) - 1) // length
    rows = max(1, min(count, most))
    last = len(stream) - length - 1
    firsts = np.linspace(0, last, rows).astype(int).tolist()
    return _fill_rows(stream, [(first, length + 1) for first in firsts], length)
