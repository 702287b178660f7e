"""Documents as byte segments, each with a loss-mask flag.

Every document ends with the vocabulary's end of text, which is token 0 in most vocabularies. This
token counts in the loss, because a model must learn where to stop.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rwkv7_jax.data.text_files import CHUNK, TextFile
from rwkv7_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a document.

    Attributes:
        text: its bytes, or the file that holds them; a plain path is read byte for byte.
        in_loss: whether its tokens count as targets.
    """

    text: bytes | Path | TextFile
    in_loss: bool = True

    def chunks(self) -> Iterator[bytes]:
        """Reads the bytes in chunks."""
        if isinstance(self.text, bytes):
            yield self.text
        elif isinstance(self.text, TextFile):
            yield from self.text.chunks()
        else:
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

    A prompt therefore has the same ids as when a model gets it without the answer.

    Attributes:
        segments: segments in the order of the text.
    """

    segments: tuple[Segment, ...]

    def text(self) -> bytes:
        """Reads all bytes."""
        return b"".join(self._chunks())

    def size(self) -> int:
        """Counts the bytes of the text."""
        return sum(segment.size() for segment in self.segments)

    def content_hash(self) -> int:
        """Computes a 64-bit hash of the bytes, which alone decides whether it is held out."""
        # Hashes bytes, not ids, so that every tokenizer holds out the same documents.
        digest = hashlib.blake2b(digest_size=8)
        for chunk in self._chunks():
            digest.update(chunk)
        return int.from_bytes(digest.digest(), "big")

    def ids(self, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, bool]]:
        """Yields the ids in pieces, each with a flag for whether it is in the loss.

        The last id is the vocabulary's end of text, if there is one.
        """
        for segment in self.segments:
            for ids in tokenizer.encode_chunks(segment.chunks()):
                yield ids, segment.in_loss
        if tokenizer.stop_ids:
            # The end of an answer outside the loss is not in the loss either.
            in_loss = all(segment.in_loss for segment in self.segments[-1:])
            yield np.array(tokenizer.stop_ids, tokenizer.dtype), in_loss

    def _chunks(self) -> Iterator[bytes]:
        for segment in self.segments:
            yield from segment.chunks()


def held_out_threshold(share: float) -> int:
    """Computes the threshold below which a content hash means "held out".

    Args:
        share: fraction of all documents to hold out.
    """
    # A hash has 64 bits, so a share of 1 holds out everything.
    return math.ceil(share * 2**64)
