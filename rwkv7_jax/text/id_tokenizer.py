"""Ids written as numbers, for models whose ids are no text."""

import functools
import re
from collections.abc import Iterable, Iterator

import numpy as np

from rwkv7_jax.text.tokenizer import Tokenizer, as_integers, text_bytes, text_digest

# Ids of token files are 32-bit integers.
_MOST_IDS = 2**31 - 1

_SEPARATORS = re.compile(rb"[\s,]+")

# Longer numbers are no ids, and cost time.
_MOST_DIGITS = 10


class IdTokenizer(Tokenizer):
    """A vocabulary of numbers: `3, 1 4` are the ids 3, 1 and 4, and are written as `3 1 4 `.

    Every id counts, 0 too: none ends a text.
    """

    def __init__(self, vocab_size: int = _MOST_IDS):
        """Takes the number of ids of the model; without a model it is not known."""
        super().__init__({}, vocab_size=vocab_size, name="ids")
        self.end_of_text = None

    @functools.cached_property
    def digest(self) -> str:
        """The digest of the way of writing: it is the same for all sizes."""
        return text_digest(self.name)

    @property
    def largest_id(self) -> int:
        """0: every model has ids that fit."""
        return 0

    def encode(self, text: str | bytes) -> list[int]:
        """Reads ids with blanks or commas between them.

        Raises:
            TypeError: neither str nor bytes.
            ValueError: something else than an id of the model.
        """
        ids = []
        for number in _SEPARATORS.split(text_bytes(text)):
            # Blanks and commas at the ends leave empty pieces.
            if not number:
                continue
            is_id = number.isdigit() and len(number) <= _MOST_DIGITS
            if not (is_id and int(number) < self.vocab_size):
                shown = number[:40].decode(errors="replace")
                raise ValueError(
                    f"Tokenizer.encode: `text` must hold ids from 0 and below {self.vocab_size:,} "
                    f"with blanks or commas between them; got {shown!r}."
                )
            ids.append(int(number))
        return ids

    def encode_chunks(self, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Encodes all chunks joined; a number that a chunk cuts waits for the next one."""
        pending = b""
        for chunk in chunks:
            pending += chunk
            last = 0
            for match in _SEPARATORS.finditer(pending):
                last = match.end()
            ids = self.encode(pending[:last])
            if ids:
                yield np.asarray(ids, self.dtype)
            pending = pending[last:]
            if len(pending) > _MOST_DIGITS:
                # No id: refused now, since it would be looked through again with every chunk.
                self.encode(pending)
        ids = self.encode(pending)
        if ids:
            yield np.asarray(ids, self.dtype)

    def token_bytes(self, token: int) -> bytes:
        """Returns the number and a blank.

        Raises:
            TypeError: the id is no integer.
            ValueError: outside the vocabulary.
        """
        # The check is that of all vocabularies; without entries it returns no bytes.
        super().token_bytes(token)
        return b"%d " % token

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Writes ids as numbers, a blank after each.

        Raises:
            TypeError: no list of integers.
            ValueError: an id outside the vocabulary.
        """
        return b"".join([self.token_bytes(number) for number in as_integers(ids)])
