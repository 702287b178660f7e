"""Streams of token ids, in memory or in memory-mapped files."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from rwkv7_jax.checks import as_array, prefix_errors

# Number of ids that are processed at once.
_CHUNK = 1 << 20

# A longer stream (1 GiB at two bytes per id) is hashed by samples.
HASHED_IN_FULL = 1 << 29

# Number of blocks of `_CHUNK` ids that are hashed of a longer stream.
_HASHED_BLOCKS = 1 << 9


@dataclasses.dataclass(frozen=True, eq=False)
class TokenArray:
    """The ids of one array or file.

    Attributes:
        ids: integers; may be memory-mapped.
        in_loss: 1 for every id that counts as a target, else 0; None if all count.
        starts: start of each document, followed by the number of ids; None if unknown, in which
            case `end_of_text` separates documents.
        end_of_text: the id that ends a document; None if there is none.
    """

    ids: np.ndarray
    in_loss: np.ndarray | None = None
    starts: np.ndarray | None = None
    end_of_text: int | None = 0

    def find_starts(self) -> np.ndarray:
        """Returns `starts`, found by a search for the end of text if they are unknown."""
        if self.starts is not None:
            return self.starts
        size = len(self.ids)
        borders = [np.array([0, size])]
        if self.end_of_text is None:
            return np.unique(borders[0])
        # In chunks, because comparing all ids at once would need one byte per id.
        for first in range(0, size, _CHUNK):
            ends = np.flatnonzero(self.ids[first : first + _CHUNK] == self.end_of_text)
            borders.append(first + 1 + ends)
        return np.unique(np.concatenate(borders)).astype(np.int64)


# Ids and their loss mask; None if all are in the loss.
Piece = tuple[np.ndarray, np.ndarray | None]


class TokenStream:
    """Spans of arrays that act as one sequence of ids, without joining them in memory.

    Attributes:
        arrays: the arrays that hold the ids.
        spans: [S 3] int64: index of the array, first id, end (exclusive).
        masked: whether an array has a loss mask.
    """

    def __init__(self, arrays: Sequence[TokenArray], spans: np.ndarray):
        """Builds a stream from spans, in order."""
        self.arrays = tuple(arrays)
        self.spans = spans
        sizes = spans[:, 2] - spans[:, 1]
        # The start of each span in the stream, followed by the stream's length.
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.masked = any(array.in_loss is not None for array in self.arrays)

    @classmethod
    def of_array(cls, tokens: TokenArray) -> "TokenStream":
        """Builds a stream from all ids of one array."""
        return cls.of_range(tokens, 0, len(tokens.ids))

    @classmethod
    def of_range(cls, tokens: TokenArray, first: int, end: int) -> "TokenStream":
        """Builds a stream from one span of one array."""
        span = np.array([[0, first, end]], np.int64)
        return cls([tokens], span)

    @classmethod
    def of_documents(cls, tokens: TokenArray, chosen: np.ndarray) -> "TokenStream":
        """Builds a stream from some documents of one array.

        Args:
            tokens: the array.
            chosen: one boolean per document; adjacent documents become one span.
        """
        starts = tokens.find_starts()
        # +1 at the start of a run of chosen documents, -1 after its end.
        flags = chosen.astype(np.int8)
        edges = np.diff(flags, prepend=0, append=0)
        firsts = starts[np.flatnonzero(edges > 0)]
        ends = starts[np.flatnonzero(edges < 0)]
        numbers = np.zeros_like(firsts)
        return cls([tokens], np.stack([numbers, firsts, ends], axis=1))

    @classmethod
    def concatenate(cls, streams: Sequence["TokenStream"]) -> "TokenStream":
        """Concatenates streams without copying ids."""
        arrays: list[TokenArray] = []
        spans = [np.zeros((0, 3), np.int64)]
        for stream in streams:
            # The stream's arrays are numbered after the previous ones.
            spans.append(stream.spans + np.array([len(arrays), 0, 0]))
            arrays += stream.arrays
        return cls(arrays, np.concatenate(spans))

    def __len__(self) -> int:
        """Counts the ids."""
        return int(self._offsets[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        """Returns the ids of a slice without a step."""
        if not isinstance(part, slice):
            raise TypeError(
                f"TokenStream: an index must be a slice; got {type(part).__name__}."
            )
        first, end, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"TokenStream: a slice must have no step; got {step}.")
        pieces = [ids for ids, _ in self.pieces(first, max(first, end))]
        # Most rows are in one span, where a view suffices.
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([np.zeros(0, np.uint16), *pieces])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Copies all ids into memory."""
        return np.array(self[:], dtype)

    def pieces(
        self,
        first: int,
        end: int,
    ) -> Iterator[Piece]:
        """Yields the ids of a range with their loss mask (or None), one piece per span."""
        span = int(np.searchsorted(self._offsets, first, "right")) - 1
        while first < end:
            number, span_first, _ = self.spans[span].tolist()
            offset, span_end = self._offsets[span : span + 2].tolist()
            stop = min(end, span_end)
            # Converts positions in the stream to positions in the array.
            part = slice(span_first + first - offset, span_first + stop - offset)
            array = self.arrays[number]
            in_loss = None if array.in_loss is None else array.in_loss[part]
            yield array.ids[part], in_loss
            first = stop
            span += 1

    def fill(
        self,
        first: int,
        tokens: np.ndarray,
        mask: np.ndarray,
    ) -> None:
        """Fills a row in place.

        Args:
            first: position in the stream of the row's first id.
            tokens: [N], receives the ids.
            mask: [N - 1], receives the loss mask of all ids except the first, which is not a
                target.
        """
        start = 0
        for ids, in_loss in self.pieces(first, first + len(tokens)):
            end = start + len(ids)
            tokens[start:end] = ids
            if end > 1:
                # Target i is id i + 1 of the row, so the mask is shifted by one.
                low = max(start, 1)
                flags = 1 if in_loss is None else in_loss[low - start :]
                mask[low - 1 : end - 1] = flags
            start = end

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """The start of each non-empty document, followed by the stream's length."""
        array_starts = [np.unique(array.find_starts()) for array in self.arrays]
        stream_starts = [np.zeros(0, np.int64)]
        for span, offset in zip(self.spans, self._offsets[:-1], strict=True):
            number, first, end = span
            starts = array_starts[number]
            low, high = np.searchsorted(starts, [first, end], "left")
            inside = starts[low:high]
            # A span that begins inside a document still starts a document of the stream.
            begins_inside = not len(inside) or inside[0] != first
            if end > first and begins_inside:
                inside = np.concatenate([[first], inside])
            stream_starts.append(inside - first + offset)
        return np.concatenate([*stream_starts, [len(self)]])

    def count_in_loss(self) -> int:
        """Counts the ids that are in the loss."""
        if not self.masked:
            return len(self)
        total = 0
        for ids, in_loss in self.pieces(0, len(self)):
            if in_loss is None:
                total += len(ids)
            else:
                total += int(np.count_nonzero(in_loss))
        return total

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """The indices of the documents that can be rows: those with an input and a target."""
        return np.flatnonzero(np.diff(self.starts) > 1)


def as_stream(ids: np.ndarray | TokenStream, argument: str = "`ids`") -> TokenStream:
    """Wraps an array of ids in a stream; returns a stream unchanged.

    Args:
        ids: the ids.
        argument: the argument in backticks, for error messages.

    Raises:
        TypeError: not an array of integers.
        ValueError: the array is not flat.
    """
    if isinstance(ids, TokenStream):
        return ids
    with prefix_errors("as_stream"):
        # Float ids would be rounded without notice.
        array = np.asarray(as_array(ids, argument))
        check_flat_ids(array, argument)
    return TokenStream.of_array(TokenArray(array))


def check_flat_ids(ids: np.ndarray, argument: str) -> None:
    """Checks that ids are flat and integers.

    Args:
        ids: the ids.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the ids are not integers.
        ValueError: the array is not flat.
    """
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{argument} must hold integers; got {ids.dtype}.")
    if ids.ndim != 1:
        raise ValueError(f"{argument} must be flat; got shape {ids.shape}.")


def _hashed_blocks(size: int) -> Sequence[int]:
    """Returns the starts of the blocks that are hashed of a stream of `size` ids."""
    if size <= HASHED_IN_FULL:
        return range(0, size, _CHUNK)
    firsts = np.linspace(0, size - _CHUNK, _HASHED_BLOCKS)
    return firsts.astype(np.int64).tolist()


def data_hash(stream: np.ndarray | TokenStream) -> str:
    """Computes a hash (32 hexadecimal digits) of ids, loss mask and document borders.

    The hash does not depend on how the documents are stored. For more than 2**29 ids it covers only
    their number and 512 evenly spread blocks of 2**20 ids with their masks and borders, including
    the first and the last ids; a change elsewhere is not detected.
    """
    with prefix_errors("data_hash"):
        stream = as_stream(stream, "`stream`")
    starts = stream.starts
    digest = hashlib.blake2b(digest_size=16)
    # Little-endian and fixed-width throughout, so that all machines agree.
    sizes = np.array([len(stream), len(starts)], "<i8")
    digest.update(sizes.tobytes())
    for first in _hashed_blocks(len(stream)):
        end = min(first + _CHUNK, len(stream))
        low, high = np.searchsorted(starts, [first, end])
        borders = starts[low:high] - first
        digest.update(borders.astype("<u4").tobytes())
        # Hashes the positions outside the loss, so that an all-ones mask equals no mask.
        not_in_loss = [np.zeros(0, np.int64)]
        position = first
        for ids, in_loss in stream.pieces(first, end):
            digest.update(ids.astype("<u4").tobytes())
            if in_loss is not None:
                zeros = np.flatnonzero(np.equal(in_loss, 0))
                not_in_loss.append(position + zeros)
            position += len(ids)
        masked = np.concatenate(not_in_loss).astype("<i8")
        digest.update(b"|" + masked.tobytes())
    return digest.hexdigest()
