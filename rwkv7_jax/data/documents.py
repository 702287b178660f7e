"""A document: bytes in pieces, of which some are learnt and others only read.

Every document ends with token 0, which is learnt: a model shall know where to stop.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

# Bytes of a file that are held at once.
CHUNK = 1 << 16

KEYS = 2**64


@runtime_checkable
class Encoder(Protocol):
    """What making ids of a document asks of a tokenizer."""

    def encode_chunks(self, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The ids of all chunks joined."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a document.

    Attributes:
        text: its bytes, or the file that holds them.
        learnt: whether its tokens count as targets.
    """

    text: bytes | Path
    learnt: bool = True

    def chunks(self) -> Iterator[bytes]:
        """The bytes, some at a time."""
        if isinstance(self.text, bytes):
            yield self.text
            return
        with self.text.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def size(self) -> int:
        """Bytes."""
        return len(self.text) if isinstance(self.text, bytes) else self.text.stat().st_size


@dataclasses.dataclass(frozen=True)
class Document:
    """A text in pieces; each is turned into ids for itself.

    So a prompt has the same ids here as when it is given to a model, where no answer follows it.
    """

    pieces: tuple[Segment, ...]

    def text(self) -> bytes:
        """All its bytes."""
        return b"".join(chunk for piece in self.pieces for chunk in piece.chunks())

    def size(self) -> int:
        """Bytes of the text."""
        return sum(piece.size() for piece in self.pieces)

    def key(self) -> int:
        """A number below 2**64 that depends on its bytes alone; it decides what is held out."""
        digest = hashlib.blake2b(digest_size=8)
        for piece in self.pieces:
            for chunk in piece.chunks():
                digest.update(chunk)
        return int.from_bytes(digest.digest(), "big")

    def ids(self, tokenizer: Encoder) -> Iterator[tuple[np.ndarray, bool]]:
        """Its ids and at last token 0, some at a time, with whether they are learnt."""
        for piece in self.pieces:
            for ids in tokenizer.encode_chunks(piece.chunks()):
                yield ids, piece.learnt
        yield np.zeros(1, np.uint16), True


def held_out_threshold(share: float) -> int:
    """Documents whose key is below this number are held out: a share of all, in any order."""
    return min(max(math.ceil(share * KEYS), 0), KEYS)
