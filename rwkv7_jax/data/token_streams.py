"""Documents' ids as one long row, in memory or in files that stay on the disk."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

# Ids that are looked at together where all are looked at.
_CHUNK = 1 << 20

# Above so many ids (1 GiB of them, at two bytes each) a hash takes samples.
WHOLE = 1 << 29

_SAMPLES = 1 << 9


@dataclasses.dataclass(frozen=True, eq=False)
class TokenArray:
    """Ids as they lie in one array or file.

    Attributes:
        ids: integers; may be memory-mapped.
        learnt: 1 for every id that counts as a target, else 0; None where all do.
        starts: where each document begins, and last where the ids end; None where they are not
            known, and token 0 says where documents end.
    """

    ids: np.ndarray
    learnt: np.ndarray | None = None
    starts: np.ndarray | None = None

    def known_starts(self) -> np.ndarray:
        """`starts`, found from tokens 0 where they are not given."""
        if self.starts is not None:
            return self.starts
        size = len(self.ids)
        ends = [
            first + 1 + np.flatnonzero(self.ids[first : first + _CHUNK] == 0)
            for first in range(0, size, _CHUNK)
        ]
        return np.unique(np.concatenate([[0, size], *ends])).astype(np.int64)


class TokenStream:
    """Stretches of ids, one behind the other, which are read as one row and never joined in memory.

    Attributes:
        parts: where the ids lie.
        stretches: [S 3] int64: which part, its first id, the one behind its last.
    """

    def __init__(self, parts: Sequence[TokenArray], stretches: np.ndarray):
        """The stream of these stretches."""
        self.parts, self.stretches = tuple(parts), stretches
        sizes = stretches[:, 2] - stretches[:, 1]
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.masked = any(part.learnt is not None for part in self.parts)

    @classmethod
    def whole(cls, tokens: TokenArray) -> "TokenStream":
        """All of one array."""
        return cls.between(tokens, 0, len(tokens.ids))

    @classmethod
    def between(cls, tokens: TokenArray, first: int, behind: int) -> "TokenStream":
        """One stretch of one array."""
        return cls([tokens], np.array([[0, first, behind]], np.int64))

    @classmethod
    def chosen(cls, tokens: TokenArray, documents: np.ndarray) -> "TokenStream":
        """The documents at which a row of booleans is true; neighbours become one stretch."""
        starts = tokens.known_starts()
        edges = np.diff(np.concatenate([[0], documents.astype(np.int8), [0]]))
        first, behind = starts[np.flatnonzero(edges > 0)], starts[np.flatnonzero(edges < 0)]
        return cls([tokens], np.stack([np.zeros_like(first), first, behind], axis=1))

    @classmethod
    def joined(cls, streams: Sequence["TokenStream"]) -> "TokenStream":
        """Several, one behind the other."""
        parts, stretches = [], [np.zeros((0, 3), np.int64)]
        for stream in streams:
            stretches.append(stream.stretches + np.array([[len(parts), 0, 0]]))
            parts += stream.parts
        return cls(parts, np.concatenate(stretches))

    def __len__(self) -> int:
        """Ids."""
        return int(self._offsets[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        """The ids of a slice without a step."""
        first, behind, step = place.indices(len(self))
        if step != 1:
            raise ValueError(f"TokenStream: a slice must have no step; got {step}.")
        pieces = [ids for ids, _ in self.pieces(first, max(first, behind))]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint16), *pieces])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """All ids in memory."""
        return np.array(self[:], dtype)

    def pieces(self, first: int, behind: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """The ids of a range, and which of them are learnt, in as few pieces as they lie in."""
        stretch = int(np.searchsorted(self._offsets, first, "right")) - 1
        while first < behind:
            number, begin, _ = self.stretches[stretch].tolist()
            offset, end = self._offsets[stretch : stretch + 2].tolist()
            last = min(behind, end)
            place = slice(begin + first - offset, begin + last - offset)
            part = self.parts[number]
            yield part.ids[place], None if part.learnt is None else part.learnt[place]
            first, stretch = last, stretch + 1

    def fill(self, first: int, tokens: np.ndarray, mask: np.ndarray) -> None:
        """Write a row: ids from `first` on, and 1 or 0 for all but the first of them."""
        place = 0
        for ids, learnt in self.pieces(first, first + len(tokens)):
            end = place + len(ids)
            tokens[place:end] = ids
            if end > 1:
                low = max(place, 1)
                mask[low - 1 : end - 1] = 1 if learnt is None else learnt[low - place :]
            place = end

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Where each document begins, empty ones left out, and last where the stream ends."""
        known = [np.unique(part.known_starts()) for part in self.parts]
        found = [np.zeros(0, np.int64)]
        for (part, first, behind), offset in zip(self.stretches, self._offsets, strict=False):
            starts = known[part]
            low, high = np.searchsorted(starts, [first, behind], "left")
            inside = starts[low:high]
            if behind > first and (not len(inside) or inside[0] != first):
                inside = np.concatenate([[first], inside])
            found.append(inside - first + offset)
        return np.concatenate([*found, [len(self)]])

    def count_learnt(self) -> int:
        """Ids that count as targets."""
        if not self.masked:
            return len(self)
        found = self.pieces(0, len(self))
        return sum(len(ids) if one is None else int(np.count_nonzero(one)) for ids, one in found)

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """The numbers of the documents that can be rows: those with an input and a target."""
        return np.flatnonzero(np.diff(self.starts) > 1)


def as_stream(ids: np.ndarray | TokenStream) -> TokenStream:
    """A stream of an array of ids; a stream as it is."""
    return ids if isinstance(ids, TokenStream) else TokenStream.whole(TokenArray(ids))


def data_hash(stream: np.ndarray | TokenStream) -> str:
    """32 hexadecimal digits that change when an id, a mask or a document's border does.

    The same documents have the same hash however they are kept. Of more than 2**29 ids only their
    number and 512 blocks of 2**20 ids (masks and borders in them likewise) are hashed, evenly
    spread with the first and the last among them: a change elsewhere passes unnoticed.
    """
    stream = as_stream(stream)
    digest = hashlib.blake2b(digest_size=16)
    size, starts = len(stream), stream.starts
    digest.update(np.array([size, len(starts)], "<i8").tobytes())
    blocks = range(0, size, _CHUNK)
    if size > WHOLE:
        blocks = np.linspace(0, size - _CHUNK, _SAMPLES).astype(np.int64).tolist()
    for first in blocks:
        behind = min(first + _CHUNK, size)
        low, high = np.searchsorted(starts, [first, behind])
        digest.update((starts[low:high] - first).astype("<u4").tobytes())
        unlearnt = [np.zeros(0, np.int64)]
        for ids, learnt in stream.pieces(first, behind):
            digest.update(ids.astype("<u4").tobytes())
            if learnt is not None:
                unlearnt.append(first + np.flatnonzero(np.equal(learnt, 0)))
            first += len(ids)
        digest.update(b"|" + np.concatenate(unlearnt).astype("<i8").tobytes())
    return digest.hexdigest()
