"""The ids of documents as one long row, in memory or in files that stay on the disk."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

# Ids that are processed at once where all ids of a stream are.
_CHUNK = 1 << 20

# A longer stream (1 GiB at two bytes an id) is hashed by samples.
HASHED_IN_FULL = 1 << 29

# Blocks of `_CHUNK` ids that are hashed of a longer stream.
_HASHED_BLOCKS = 1 << 9


@dataclasses.dataclass(frozen=True, eq=False)
class TokenArray:
    """Ids as they lie in one array or file.

    Attributes:
        ids: integers; may be memory-mapped.
        in_loss: 1 for every id that counts as a target, else 0; None where all do.
        starts: where each document begins, and last where the ids end; None where they are not
            known, and `end_of_text` says where documents end.
        end_of_text: the id that ends a document; None where nothing does.
    """

    ids: np.ndarray
    in_loss: np.ndarray | None = None
    starts: np.ndarray | None = None
    end_of_text: int | None = 0

    def find_starts(self) -> np.ndarray:
        """Returns `starts`, searched for ends of text where they are not known."""
        if self.starts is not None:
            return self.starts
        size = len(self.ids)
        borders = [np.array([0, size])]
        if self.end_of_text is None:
            return np.unique(borders[0])
        # In chunks: a comparison of all ids at once would need as many bytes again.
        for first in range(0, size, _CHUNK):
            ends = np.flatnonzero(self.ids[first : first + _CHUNK] == self.end_of_text)
            borders.append(first + 1 + ends)
        return np.unique(np.concatenate(borders)).astype(np.int64)


# Ids, and which of them are in the loss; None where all are.
Piece = tuple[np.ndarray, np.ndarray | None]


class TokenStream:
    """Spans of arrays that read as one row of ids and are never joined in memory.

    Attributes:
        arrays: where the ids are.
        spans: [S 3] int64: number of the array, first id, end (one more than the last id).
        masked: whether an array has ids that are not in the loss.
    """

    def __init__(self, arrays: Sequence[TokenArray], spans: np.ndarray):
        """Makes a stream of these spans, in their order."""
        self.arrays = tuple(arrays)
        self.spans = spans
        sizes = spans[:, 2] - spans[:, 1]
        # Where each span begins in the stream, and last where the stream ends.
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.masked = any(array.in_loss is not None for array in self.arrays)

    @classmethod
    def of_array(cls, tokens: TokenArray) -> "TokenStream":
        """Makes a stream of all ids of one array."""
        return cls.of_range(tokens, 0, len(tokens.ids))

    @classmethod
    def of_range(cls, tokens: TokenArray, first: int, end: int) -> "TokenStream":
        """Makes a stream of one span of one array."""
        span = np.array([[0, first, end]], np.int64)
        return cls([tokens], span)

    @classmethod
    def of_documents(cls, tokens: TokenArray, chosen: np.ndarray) -> "TokenStream":
        """Makes a stream of some documents of one array.

        Args:
            tokens: the array.
            chosen: a boolean for each document. Neighbours become one span.
        """
        starts = tokens.find_starts()
        # +1 where a run of chosen documents begins, -1 where it has ended.
        flags = chosen.astype(np.int8)
        edges = np.diff(flags, prepend=0, append=0)
        firsts = starts[np.flatnonzero(edges > 0)]
        ends = starts[np.flatnonzero(edges < 0)]
        numbers = np.zeros_like(firsts)
        return cls([tokens], np.stack([numbers, firsts, ends], axis=1))

    @classmethod
    def concatenate(cls, streams: Sequence["TokenStream"]) -> "TokenStream":
        """Joins streams, one after the other, without copying ids."""
        arrays: list[TokenArray] = []
        spans = [np.zeros((0, 3), np.int64)]
        for stream in streams:
            # The stream's arrays get the numbers after those that are already there.
            spans.append(stream.spans + np.array([len(arrays), 0, 0]))
            arrays += stream.arrays
        return cls(arrays, np.concatenate(spans))

    def __len__(self) -> int:
        """Counts the ids."""
        return int(self._offsets[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        """Returns the ids of a slice without a step."""
        first, end, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"TokenStream: a slice must have no step; got {step}.")
        pieces = [ids for ids, _ in self.pieces(first, max(first, end))]
        # Most rows lie in one span: a view is enough.
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
        """Yields the ids of a range with their loss mask (or None), one piece for each span."""
        span = int(np.searchsorted(self._offsets, first, "right")) - 1
        while first < end:
            number, span_first, _ = self.spans[span].tolist()
            offset, span_end = self._offsets[span : span + 2].tolist()
            stop = min(end, span_end)
            # From positions in the stream to positions in the array.
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
            tokens: [N], gets the ids.
            mask: [N - 1], gets 1 or 0 for all ids but the first, which is no target.
        """
        start = 0
        for ids, in_loss in self.pieces(first, first + len(tokens)):
            end = start + len(ids)
            tokens[start:end] = ids
            if end > 1:
                # Target i is id i + 1 of the row, so the mask is one place ahead.
                low = max(start, 1)
                flags = 1 if in_loss is None else in_loss[low - start :]
                mask[low - 1 : end - 1] = flags
            start = end

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Where each document begins, without empty ones, and last where the stream ends."""
        array_starts = [np.unique(array.find_starts()) for array in self.arrays]
        stream_starts = [np.zeros(0, np.int64)]
        for span, offset in zip(self.spans, self._offsets[:-1], strict=True):
            number, first, end = span
            starts = array_starts[number]
            low, high = np.searchsorted(starts, [first, end], "left")
            inside = starts[low:high]
            # A span that begins inside a document still begins a document of the stream.
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
        """The numbers of the documents that can be rows: those with an input and a target."""
        return np.flatnonzero(np.diff(self.starts) > 1)


def as_stream(ids: np.ndarray | TokenStream) -> TokenStream:
    """Wraps an array of ids in a stream; returns a stream as it is."""
    if isinstance(ids, TokenStream):
        return ids
    return TokenStream.of_array(TokenArray(ids))


def _hashed_blocks(size: int) -> Sequence[int]:
    """Returns where the blocks begin that are hashed of a stream of `size` ids."""
    if size <= HASHED_IN_FULL:
        return range(0, size, _CHUNK)
    firsts = np.linspace(0, size - _CHUNK, _HASHED_BLOCKS)
    return firsts.astype(np.int64).tolist()


def data_hash(stream: np.ndarray | TokenStream) -> str:
    """Computes 32 hexadecimal digits that change when an id, a mask or a document's border does.

    The same documents have the same hash however they are stored. Of more than 2**29 ids only their
    number and 512 blocks of 2**20 ids (with the masks and borders in them) are hashed, evenly
    spread, the first and the last ids included: a change elsewhere is not noticed.
    """
    stream = as_stream(stream)
    starts = stream.starts
    digest = hashlib.blake2b(digest_size=16)
    # Little-endian and of fixed widths throughout, so that all machines agree.
    sizes = np.array([len(stream), len(starts)], "<i8")
    digest.update(sizes.tobytes())
    for first in _hashed_blocks(len(stream)):
        end = min(first + _CHUNK, len(stream))
        low, high = np.searchsorted(starts, [first, end])
        borders = starts[low:high] - first
        digest.update(borders.astype("<u4").tobytes())
        # Positions that are not in the loss: an all-ones mask must hash as no mask does.
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
