"""Documents put together into rows, which they fill, each as a sequence of its own."""

import bisect
import weakref
from typing import NamedTuple

import numpy as np

from rwkv7_jax.data.token_streams import TokenStream

# A row has at most this many times the documents of a mean row: the rows of a batch share one
# number of sequences, and each of them costs a state.
_MOST_OVER_MEAN = 2


class PackedDocuments(NamedTuple):
    """Which documents share a row.

    Attributes:
        documents: their numbers, row after row.
        borders: where each row's begin in `documents`, and last where they end.
    """

    documents: np.ndarray
    borders: np.ndarray

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.borders) - 1

    @property
    def sequences(self) -> int:
        """The most documents of a row (K)."""
        return int(np.diff(self.borders).max())

    def row(self, number: int) -> np.ndarray:
        """Returns the documents of one row."""
        first, end = self.borders[number : number + 2]
        return self.documents[first:end]


# By the row's length. Kept as long as the stream: every step of a run asks for the same.
_PACKED: weakref.WeakKeyDictionary[TokenStream, dict[int, PackedDocuments]] = (
    weakref.WeakKeyDictionary()
)


def pack_documents(stream: TokenStream, length: int) -> PackedDocuments:
    """Fills rows of `length` + 1 ids with documents, longer ones cut; the same every time.

    Args:
        stream: with a document of two ids or more.
        length: inputs of a row (T).
    """
    packed = _PACKED.setdefault(stream, {})
    if length not in packed:
        packed[length] = _pack(stream, length)
    return packed[length]


def _pack(stream: TokenStream, length: int) -> PackedDocuments:
    """Fills the rows.

    Each document goes where it leaves least room. They come in an order drawn once, so that
    neighbours of a file do not share a row and no row has only short ones.
    """
    room = length + 1
    numbers = stream.documents
    sizes = np.minimum(stream.starts[numbers + 1] - stream.starts[numbers], room)
    most = _MOST_OVER_MEAN * -(-room // max(int(sizes.mean()), 1))
    rows: list[list[int]] = []
    # Room and number of the rows that take more, by room.
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
        # A document has two ids at least.
        if left - size > 1 and len(rows[row]) < most:
            bisect.insort(unfilled, (left - size, row))
    borders = np.cumsum([0, *map(len, rows)])
    return PackedDocuments(np.concatenate(rows).astype(np.int64), borders)
