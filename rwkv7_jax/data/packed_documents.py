"""Packing of documents into rows, in which each document is its own sequence."""

import bisect
import weakref
from typing import NamedTuple

import numpy as np

from rwkv7_jax.data.token_streams import TokenStream

# A row has at most this many times the mean number of documents. All rows of a batch share one
# number of sequences, and each sequence costs a state.
_MOST_OVER_MEAN = 2


class PackedDocuments(NamedTuple):
    """The assignment of documents to rows.

    Attributes:
        documents: document indices, row by row.
        borders: start of each row in `documents`, followed by the end.
    """

    documents: np.ndarray
    borders: np.ndarray

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.borders) - 1

    @property
    def sequences(self) -> int:
        """The largest number of documents in a row (K)."""
        return int(np.diff(self.borders).max())

    def row(self, number: int) -> np.ndarray:
        """Returns the documents of one row."""
        first, end = self.borders[number : number + 2]
        return self.documents[first:end]


# Cached by row length for the lifetime of the stream, because every step needs it.
_PACKED: weakref.WeakKeyDictionary[TokenStream, dict[int, PackedDocuments]] = (
    weakref.WeakKeyDictionary()
)


def pack_documents(stream: TokenStream, length: int) -> PackedDocuments:
    """Packs documents, truncated to `length` + 1 ids, into rows of that size; deterministic.

    Args:
        stream: a stream with a document of at least two ids.
        length: number of inputs per row (T).
    """
    packed = _PACKED.setdefault(stream, {})
    if length not in packed:
        packed[length] = _pack(stream, length)
    return packed[length]


def _pack(stream: TokenStream, length: int) -> PackedDocuments:
    """Packs the documents by best fit, in a fixed random order.

    The random order keeps neighbours in a file from sharing a row, and rows from having only short
    documents.
    """
    room = length + 1
    numbers = stream.documents
    sizes = np.minimum(stream.starts[numbers + 1] - stream.starts[numbers], room)
    most = _MOST_OVER_MEAN * -(-room // max(int(sizes.mean()), 1))
    rows: list[list[int]] = []
    # The room and index of each row that is not full, sorted by room.
    unfilled: list[tuple[int, int]] = []
    for index in np.random.default_rng(0).permutation(len(numbers)).tolist():
        size = int(sizes[index])
        place = bisect.bisect_left(unfilled, (size, -1))
        if place < len(unfilled):
            left, row = unfilled.pop(place)
        else:
            left = room
            row = len(rows)
            rows.append([])
        rows[row].append(int(numbers[index]))
        # A document has at least two ids.
        if left - size > 1 and len(rows[row]) < most:
            bisect.insort(unfilled, (left - size, row))
    borders = np.cumsum([0, *map(len, rows)])
    return PackedDocuments(np.concatenate(rows).astype(np.int64), borders)
