"""A tokenizer of ids written as numbers, for models whose ids do not stand for text."""

import functools
import re
from collections.abc import Iterable, Iterator

import numpy as np

from rwkv7_jax.text.tokenizer import Tokenizer, as_integers, text_bytes, text_digest

# Ids of token files are 32-bit integers.
_MOST_IDS = 2**31 - 1

_SEPARATORS = re.compile(rb"[\s,]+")

# Longer numbers cannot be ids and would cost time.
_MOST_DIGITS = 10


class IdTokenizer(Tokenizer):
    """A vocabulary of numbers: `3, 1 4` encodes to the ids 3, 1 and 4, which decode to `3 1 4 `.

    No id ends a text, not even 0.
    """

    def __init__(self, vocab_size: int = _MOST_IDS):
        """Sets the vocabulary size; the default is for when there is no model."""
        super().__init__({}, vocab_size=vocab_size, name="ids")
        self.end_of_text = None

    @functools.cached_property
    def digest(self) -> str:
        """The digest of the format, which is the same for all sizes."""
        return text_digest(self.name)

    @property
    def largest_id(self) -> int:
        """0, so that it fits every model."""
        return 0

    def encode(self, text: str | bytes) -> list[int]:
        """Encodes ids separated by whitespace or commas.

        Raises:
            TypeError: `text` is neither str nor bytes.
            ValueError: `text` holds something other than ids of the model.
        """
        ids = []
        for number in _SEPARATORS.split(text_bytes(text)):
            # Leading and trailing separators leave empty pieces.
            if not number:
                continue
            is_id = number.isdigit() and len(number) <= _MOST_DIGITS
            if not (is_id and int(number) < self.vocab_size):
                shown = number[:40].decode(errors="replace")
                raise ValueError(
                    f"Tokenizer.encode: `text` must hold ids from 0 and below {self.vocab_size:,} "
                    f"separated by spaces or commas; got {shown!r}."
                )
            ids.append(int(number))
        return ids

    def encode_chunks(self, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Encodes the joined chunks; a number split between two chunks waits for the second."""
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
                # Not an id: rejected now, because every further chunk would scan it again.
                self.encode(pending)
        ids = self.encode(pending)
        if ids:
            yield np.asarray(ids, self.dtype)

    def token_bytes(self, token: int) -> bytes:
        """Returns the number and a space.

        Raises:
            TypeError: `token` is not an integer.
            ValueError: `token` is outside the vocabulary.
        """
        # Only for its checks.
        super().token_bytes(token)
        return b"%d " % token

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Writes ids as numbers, each followed by a space.

        Raises:
            TypeError: `ids` is not a list of integers.
            ValueError: an id is outside the vocabulary.
        """
        return b"".join([self.token_bytes(number) for number in as_integers(ids)])
