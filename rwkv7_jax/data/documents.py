"""Documents as byte segments, each with a loss-mask flag.

Every document ends with token 0, or with what ends a text in the vocabulary, and that token counts
in the loss: a model must learn where to stop.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from rwkv7_jax.data.text_files import CHUNK, TextFile

# Content hashes lie below this number.
HASH_RANGE = 2**64


@runtime_checkable
class Encoder(Protocol):
    """A tokenizer, as far as documents need one."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The id that ends a document; none where there is no such id."""
        ...

    @property
    def dtype(self) -> type[np.integer]:
        """The dtype of ids."""
        ...

    def encode_chunks(
        self,
        chunks: Iterable[bytes],
    ) -> Iterator[np.ndarray]:
        """Encodes all chunks joined, some ids at a time."""
        ...


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a document.

    Attributes:
        text: its bytes, or the file that holds them; a plain path is read as it lies on the disk.
        in_loss: whether its tokens count as targets.
    """

    text: bytes | Path | TextFile
    in_loss: bool = True

    def chunks(self) -> Iterator[bytes]:
        """Reads the bytes, some at a time."""
        if isinstance(self.text, bytes):
            yield self.text
        elif isinstance(self.text, TextFile):
            yield from self.text.chunks()
        else:
            # A file may be larger than memory.
            with self.text.open("rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk

    def size(self) -> int:
        """Counts the bytes."""
        if isinstance(self.text, bytes):
            return len(self.text)
        if isinstance(self.text, TextFile):
            return self.text.size()
        return self.text.stat().st_size


@dataclasses.dataclass(frozen=True)
class Document:
    """A text in segments, each of which is tokenized separately.

    A prompt therefore has the same ids here as when a model is given it without its answer.

    Attributes:
        segments: in the order of the text.
    """

    segments: tuple[Segment, ...]

    def text(self) -> bytes:
        """Reads all bytes."""
        return b"".join(self._chunks())

    def size(self) -> int:
        """Counts the bytes of the text."""
        return sum(segment.size() for segment in self.segments)

    def content_hash(self) -> int:
        """Computes a number below 2**64 from the bytes; the held-out split depends on it alone."""
        # Of the bytes and not the ids: the same documents are held out with every tokenizer.
        digest = hashlib.blake2b(digest_size=8)
        for chunk in self._chunks():
            digest.update(chunk)
        return int.from_bytes(digest.digest(), "big")

    def ids(
        self,
        tokenizer: Encoder,
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """Yields the ids, some at a time, with whether they are in the loss.

        Last comes the id that ends a text, token 0 of most vocabularies, where there is one.
        """
        for segment in self.segments:
            for ids in tokenizer.encode_chunks(segment.chunks()):
                yield ids, segment.in_loss
        if tokenizer.stop_ids:
            # Of an answer that is not learnt the end is not learnt either.
            in_loss = all(segment.in_loss for segment in self.segments[-1:])
            yield np.array(tokenizer.stop_ids, tokenizer.dtype), in_loss

    def _chunks(self) -> Iterator[bytes]:
        for segment in self.segments:
            yield from segment.chunks()


def held_out_threshold(share: float) -> int:
    """Computes the number below which a content hash means "held out".

    Args:
        share: of all documents that is held out, whatever their order.
    """
    # Shares of 0 and 1 must hold out nothing and everything, whatever the rounding.
    threshold = math.ceil(share * HASH_RANGE)
    return min(max(threshold, 0), HASH_RANGE)
