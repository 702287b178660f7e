"""Rows of a stream: what a batch holds, as a pure function of the seed and the step.

So a run goes on where it was without a position to save, on any number of hosts, and batches may
be made ahead, late or twice.
"""

from collections.abc import Iterable

import numpy as np

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.shuffling import ORDERS, cubic_windows, shuffled, shuffled_windows
from rwkv7_jax.data.token_streams import TokenStream, as_stream

Stream = np.ndarray | TokenStream

PACKINGS = ("stream", "documents")


def host_rows(batch_size: int, host: int, hosts: int) -> slice:
    """The rows of the global batch that one of several hosts makes.

    Raises:
        ValueError: the hosts do not divide the batch, or there is no such host.
    """
    if batch_size % hosts or not 0 <= host < hosts:
        raise ValueError(
            f"host_rows: `hosts` must divide the batch of {batch_size} rows and `host` be one of "
            f"them; got {hosts} and {host}."
        )
    share = batch_size // hosts
    return slice(host * share, (host + 1) * share)


def _rows(stream: TokenStream, places: Iterable[tuple[int, int]], length: int) -> Batch:
    """Rows from (first id, ids); what is missing to T+1 is token 0 and does not count."""
    places = list(places)
    tokens = np.zeros((len(places), length + 1), np.int32)
    mask = np.zeros((len(places), length), np.float32)
    for row, (first, size) in enumerate(places):
        stream.fill(first, tokens[row, :size], mask[row, : size - 1])
    return Batch(tokens=tokens, mask=mask)


def _candidates(stream: TokenStream, caller: str) -> np.ndarray:
    """The documents that can be rows."""
    if not len(stream.documents):
        raise ValueError(f"{caller}: `stream` must have a document of at least 2 tokens; got none.")
    return stream.documents


def _places(stream: TokenStream, found, length: int) -> list[tuple[int, int]]:
    """Where documents begin, and how much of each a row takes."""
    starts, behind = stream.starts[found], stream.starts[np.asarray(found) + 1]
    return list(zip(starts.tolist(), np.minimum(behind - starts, length + 1).tolist(), strict=True))


def batch_at(
    stream: Stream,
    step: int,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    order: str = "shuffled",
    packing: str = "stream",
    rows: slice = slice(None),
) -> Batch:
    """The batch of one step: tokens [B T+1] int32; mask [B T], 1 where a target counts.

    Packing "stream" cuts rows from all documents joined: no padding, nothing is left out. What was
    read of one document is still in the state when the next begins in the same row, as in RWKV's
    own training; and a row may begin in the middle of a document, or between a prompt and its
    answer. Packing "documents" gives each document a row of its own: nothing leaks from one to
    another, every row begins where a document does, and the end of one that is longer than T+1
    tokens is never read.

    Args:
        stream: from `token_stream`, or an array of ids.
        step: from 0.
        batch_size: rows of the global batch (B).
        length: inputs of a row (T); it also holds the last one's target.
        seed: of the order.
        order: "shuffled": in every epoch each window, or document, comes once, in an order drawn
            from (seed, epoch), the windows' borders moving from epoch to epoch. "cubic": that of
            RWKV's own trainer, for packing "stream"; the seed does nothing.
        packing: "stream" or "documents".
        rows: those of the global batch that are wanted; see `host_rows`.

    Raises:
        ValueError: an unknown order or packing, or a stream that is too short.
    """
    check_choices(order, packing, caller="batch_at")
    stream = as_stream(stream)
    samples = range(step * batch_size, (step + 1) * batch_size)[rows]
    if packing == "documents":
        found = _candidates(stream, "batch_at")
        picked = shuffled(samples, seed=seed, count=len(found))
        return _rows(stream, _places(stream, found[picked], length), length)
    size = len(stream)
    if order == "cubic":
        firsts = cubic_windows(samples, tokens=size, length=length)
    else:
        firsts = shuffled_windows(samples, seed=seed, tokens=size, length=length, caller="batch_at")
    return _rows(stream, [(first, length + 1) for first in firsts], length)


def check_choices(order: str, packing: str, *, caller: str) -> None:
    """Return if these are known and go together.

    Raises:
        ValueError: they are or do not.
    """
    for name, value, known in (("order", order, ORDERS), ("packing", packing, PACKINGS)):
        if value not in known:
            raise ValueError(f"{caller}: `{name}` must be {' or '.join(known)}; got {value!r}.")
    if order == "cubic" and packing == "documents":
        raise ValueError(
            f'{caller}: `order` must be "shuffled" where `packing` is "documents"; got "cubic".'
        )


def left_out(stream: Stream, length: int) -> tuple[int, int]:
    """Documents too long for a row of packing "documents", and their tokens that are never read."""
    longer = np.diff(as_stream(stream).starts) - (length + 1)
    return int((longer > 0).sum()), int(longer[longer > 0].sum())


def windows(stream: Stream, length: int, count: int, *, packing: str = "stream") -> Batch:
    """At most `count` rows for evaluation, evenly spread over the stream, as one batch.

    Args:
        stream: as in `batch_at`.
        length: inputs of a row (T).
        count: rows at most.
        packing: as in `batch_at`.

    Raises:
        ValueError: the stream is shorter than one window, or an unknown packing.
    """
    check_choices("shuffled", packing, caller="windows")
    stream = as_stream(stream)
    if packing == "documents":
        found = _candidates(stream, "windows")
        picked = found[np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]
        return _rows(stream, _places(stream, picked, length), length)
    if len(stream) <= length:
        raise ValueError(
            f"windows: `stream` must have more than {length} tokens; got {len(stream)}."
        )
    count = max(1, min(count, (len(stream) - 1) // length))
    starts = np.linspace(0, len(stream) - length - 1, count).astype(int).tolist()
    return _rows(stream, [(first, length + 1) for first in starts], length)
