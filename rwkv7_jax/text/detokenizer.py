"""Streaming detokenization into complete characters, up to the first stop string."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Vocabulary(Protocol):
    """The part of a tokenizer that detokenization needs."""

    def encode(self, text: str | bytes) -> list[int]:
        """Encodes a text."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one id."""
        ...


class StreamingDetokenizer:
    """An incremental decoder that returns text as soon as it is certain.

    An incomplete character and a possible beginning of a stop string are held back. The result does
    not depend on how the bytes are split: the stop string that ends first wins, and of two that end
    together the longer one. Bytes that are not UTF-8 become U+FFFD.

    Attributes:
        stopped: whether a stop string was found; the text ends before it.

    Raises:
        TypeError, ValueError: see `check_stop_strings`.
    """

    def __init__(self, stop_strings: Sequence[str] = ()):
        check_stop_strings(stop_strings)
        self._stops = tuple(map(_stop_bytes, stop_strings))
        # Holds back an incomplete character until its last byte arrives.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = b""
        self.stopped = False

    @property
    def pending_bytes(self) -> int:
        """The number of bytes that have not been returned as text.

        They may become a stop string. Once stopped, they are the stop string and what follows it.
        """
        return len(self._pending)

    def push(self, data: bytes) -> str:
        """Adds bytes and returns the text that they make certain; empty once stopped."""
        # Also after a stop, because `pending_bytes` counts what follows the stop string.
        self._pending += data
        if self.stopped:
            return ""
        begin = self._find_stop()
        if begin is not None:
            self.stopped = True
            return self._release(begin, final=True)
        return self._release(len(self._pending) - self._possible_stop(), final=False)

    def close(self) -> str:
        """Ends the input and returns the rest of the text."""
        if self.stopped:
            return ""
        return self._release(len(self._pending), final=True)

    def _release(self, size: int, *, final: bool) -> str:
        text = self._pending[:size]
        self._pending = self._pending[size:]
        return self._decoder.decode(text, final)

    def _find_stop(self) -> int | None:
        """Finds the beginning of the stop string that ends first; the longest in a tie."""
        ends = []
        for stop in self._stops:
            begin = self._pending.find(stop)
            if begin >= 0:
                ends.append((begin + len(stop), begin))
        if not ends:
            return None
        # The smallest end; in a tie the smallest beginning, which is the longest string.
        _, begin = min(ends)
        return begin

    def _possible_stop(self) -> int:
        """Returns the size of the longest pending suffix that is a prefix of a stop string."""
        # At most one byte less than a stop string: `_find_stop` would have found a complete one.
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self._pending)), 0, -1):
            end = self._pending[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0


def whole_tokens(
    tokens: Sequence[int],
    drop: int,
    vocabulary: Vocabulary,
) -> tuple[int, int]:
    """Counts the tokens that stay complete when the last `drop` bytes are removed.

    Args:
        tokens: ids with at least `drop` bytes in total.
        drop: number of bytes to remove from the end.
        vocabulary: the tokenizer.

    Returns:
        The number of complete tokens, and the number of bytes kept of the next token.
    """
    count = len(tokens)
    while drop > 0:
        # Token by token from the end; the last token removed may be split.
        count -= 1
        drop -= len(vocabulary.token_bytes(tokens[count]))
    return count, -drop


def spell(text: str | bytes, vocabulary: Vocabulary) -> list[int]:
    """Returns the ids that decode to exactly a text; empty if the vocabulary cannot encode it."""
    try:
        data = text.encode() if isinstance(text, str) else text
        ids = vocabulary.encode(text)
    except ValueError:
        return []
    spelled = b"".join([vocabulary.token_bytes(token) for token in ids])
    return ids if spelled == data else []


def check_stop_strings(stop_strings: Sequence[str]) -> None:
    """Checks a list of stop strings.

    Raises:
        TypeError: it is not a list of strings.
        ValueError: a string is empty, or has a lone surrogate, which has no UTF-8.
    """
    is_list = isinstance(stop_strings, Iterable) and not isinstance(stop_strings, str)
    if not is_list or not all(isinstance(stop, str) for stop in stop_strings):
        raise TypeError(
            f"`stop_strings` must be a list of strings; got {stop_strings!r}."
        )
    if "" in stop_strings:
        raise ValueError("`stop_strings` must hold no empty string; got one.")
    for stop in stop_strings:
        try:
            _stop_bytes(stop)
        except UnicodeEncodeError as error:
            raise ValueError(
                "`stop_strings` must be valid Unicode; got a lone surrogate at character "
                f"{error.start} of {stop!r}."
            ) from None


def _stop_bytes(stop: str) -> bytes:
    """Returns the bytes of a stop string.

    Lone surrogates that stand for bytes, as in a command line that is not UTF-8, become these
    bytes.
    """
    return stop.encode("utf-8", "surrogateescape")
