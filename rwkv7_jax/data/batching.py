"""Batches of a stream, as a pure function of the seed and the step.

A run can therefore continue without a saved position, on any number of hosts, and batches may be
made ahead, late or twice.
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

# First id and number of ids of a row in the stream.
Span = tuple[int, int]


def host_rows(batch_size: int, host: int, hosts: int) -> slice:
    """Returns the rows of the global batch that one of several hosts makes.

    Args:
        batch_size: rows of the global batch (B).
        host: the host's number, from 0.
        hosts: how many there are; they must divide the batch.

    Raises:
        ValueError: the hosts do not divide the batch, or there is no such host.
    """
    if batch_size % hosts or not 0 <= host < hosts:
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
    """Makes a row of each span of the stream.

    Args:
        stream: where the ids are.
        spans: first id and number of ids, at most `length` + 1.
        length: inputs of a row (T). Token 0 fills shorter rows; it is not in the loss.
    """
    tokens = np.zeros((len(spans), length + 1), np.int32)
    mask = np.zeros((len(spans), length), np.float32)
    for row, (first, size) in enumerate(spans):
        # Views of the batch, filled in place: no row is copied.
        stream.fill(first, tokens[row, :size], mask[row, : size - 1])
    return Batch(tokens=tokens, mask=mask)


def _document_spans(
    stream: TokenStream, documents: Sequence[int] | np.ndarray, length: int
) -> list[Span]:
    """Returns the spans of some documents, cut where they are longer than a row."""
    numbers = np.asarray(documents)
    starts = stream.starts[numbers]
    ends = stream.starts[numbers + 1]
    sizes = np.minimum(ends - starts, length + 1)
    return list(zip(starts.tolist(), sizes.tolist(), strict=True))


def _fill_packed_rows(stream: TokenStream, rows: Sequence[int], length: int) -> Batch:
    """Makes rows of several documents, by their numbers among the packed rows."""
    packed = pack_documents(stream, length)
    tokens = np.zeros((len(rows), length + 1), np.int32)
    mask = np.zeros((len(rows), length), np.float32)
    segments = np.full((len(rows), packed.sequences), length, np.int32)
    for row, number in enumerate(rows):
        begin = 0
        spans = _document_spans(stream, packed.row(number), length)
        for place, (first, size) in enumerate(spans):
            end = begin + size
            # The target of a document's last id would be the next one's first: not in the loss.
            stream.fill(first, tokens[row, begin:end], mask[row, begin : end - 1])
            segments[row, place] = begin
            begin = end
    return Batch(tokens=tokens, mask=mask, segments=segments)


def check_documents(stream: TokenStream, argument: str = "`stream`") -> None:
    """Checks that a document can be a row of packing "documents", or a part of one.

    Raises:
        ValueError: none has an input and a target.
    """
    if not len(stream.documents):
        raise ValueError(
            f"{argument} must have a document of at least 2 tokens; got none."
        )


def fewest_windows(order: str) -> int:
    """Returns how many windows a stream must have for an order of packing "stream"."""
    # The cubic order needs a prime number of them, two, and leaves the last one out.
    return 3 if order == "cubic" else 2


def check_long_enough(
    stream: TokenStream,
    length: int,
    *,
    order: str,
    packing: str,
    argument: str = "`stream`",
) -> None:
    """Checks that rows can be cut from a stream.

    Args:
        stream: all ids.
        length: inputs of a row (T).
        order: as in `batch_at`.
        packing: as in `batch_at`.
        argument: where the ids come from, in backticks; the message begins with it.

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
    """Makes the batch of one step: tokens [B T+1] int32; mask [B T], 1 where a target counts.

    Packing "stream" cuts rows from all documents joined: no padding, nothing is left out. The state
    still holds what was read of one document when the next begins in the same row, as in RWKV's own
    training; and a row may begin in the middle of a document, or between a prompt and its answer.
    Packing "documents" gives each document a row of its own: nothing leaks from one to another,
    every row begins where a document does, and the end of one that is longer than T+1 tokens is
    never read. Packing "packed" puts these same documents together until rows are full: `segments`
    says where each begins, so that each is read as if it had a row of its own. Which share a row
    depends on the documents and T alone, not on the seed.

    Args:
        stream: from `token_stream`, or an array of ids.
        step: from 0.
        batch_size: rows of the global batch (B).
        length: inputs of a row (T); it also holds the last one's target.
        seed: of the order.
        order: "shuffled": in every epoch each window, or document, comes once, in an order drawn
            from (seed, epoch), and the windows' borders move from epoch to epoch. "cubic": that of
            RWKV's own trainer, for packing "stream"; the seed has no effect.
        packing: "stream", "documents" or "packed".
        rows: those of the global batch that are wanted; see `host_rows`.

    Raises:
        ValueError: an unknown order or packing, or a stream that is too short.
    """
    stream = as_stream(stream)
    with prefix_errors("batch_at"):
        check_choices(order, packing)
        check_count(step, 0, "`step`")
        check_batch_sizes(batch_size, length, seed, rows)
        check_long_enough(stream, length, order=order, packing=packing)
    # Samples are numbered through all steps; a host makes those of its rows.
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
    """Checks that batches of these sizes can be cut.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a size below 1, or a negative seed.
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
    """Makes the batches of all steps from `start_step` on, without end.

    With packing "documents" or "packed" a warning says how much of longer documents is left out.

    Args:
        stream: from `token_stream`.
        batch_size: rows of the global batch (B).
        length: inputs of a row (T).
        seed: of the order.
        start_step: the step of the first batch.
        order: as in `batch_at`.
        packing: as in `batch_at`.
        rows: those of the global batch that are wanted; see `host_rows`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an unknown order or packing, a number out of its range, or a stream that is too
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
    # A first batch at once: faults are raised here and not at the first `next`, in another thread.
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
    """Checks that an order and a packing exist and can be combined.

    Raises:
        ValueError: they do not, or cannot.
    """
    check_choice(order, ORDERS, "`order`")
    check_choice(packing, PACKINGS, "`packing`")
    if order == "cubic" and packing != "stream":
        raise ValueError(
            f'`order` must be "shuffled" where `packing` is "{packing}"; got "cubic".'
        )


def left_out(stream: IdsOrStream, length: int) -> tuple[int, int]:
    """Counts documents that are longer than a row, and their tokens that are never read.

    They are read in full with packing "stream".
    """
    sizes = np.diff(as_stream(stream).starts)
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
    """Makes one batch for evaluation, of at most `count` rows spread evenly over the stream.

    Args:
        stream: as in `batch_at`.
        length: inputs of a row (T).
        count: rows at most.
        packing: as in `batch_at`; "packed" gives rows of single documents, as "documents" does.

    Raises:
        ValueError: the stream is shorter than one window, or an unknown packing.
    """
    stream = as_stream(stream)
    with prefix_errors("windows"):
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
    # Windows do not overlap, so a short stream gives fewer than were wanted.
    most = (len(stream) - 1) // length
    rows = max(1, min(count, most))
    last = len(stream) - length - 1
    firsts = np.linspace(0, last, rows).astype(int).tolist()
    return _fill_rows(stream, [(first, length + 1) for first in firsts], length)
