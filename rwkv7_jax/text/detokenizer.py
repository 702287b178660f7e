"""Text from the bytes of tokens: whole characters only, up to the first stop string."""

import codecs
from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Vocabulary(Protocol):
    """What turning ids into text asks of a tokenizer."""

    def encode(self, text: str | bytes) -> list[int]:
        """The ids that spell `text`."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for."""


class StreamingDetokenizer:
    """Bytes go in as they come, text comes out as soon as it is certain.

    An incomplete character and the beginning of a possible stop string are held back. The result
    does not depend on how the bytes were cut: the stop string that is complete first counts, of
    two that end together the longer one. Bytes that are no UTF-8 become U+FFFD.

    Attributes:
        stopped: a stop string was found; the text ends before it.
        held: bytes that went in and are not text so far: what may become a stop string, or, once
            stopped, the stop string and what follows it.
    """

    def __init__(self, stop_strings: Sequence[str] = ()):
        """Nothing has come in."""
        self._stops = tuple(stop.encode("utf-8", "surrogateescape") for stop in stop_strings)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = b""
        self.stopped = False

    @property
    def held(self) -> int:
        """See the class."""
        return len(self._pending)

    def push(self, data: bytes) -> str:
        """The text that `data` makes certain; empty once stopped."""
        self._pending += data
        if self.stopped:
            return ""
        found = [
            (at + len(stop), at) for stop in self._stops if (at := self._pending.find(stop)) >= 0
        ]
        if found:
            self.stopped = True
            return self._release(min(found)[1], final=True)
        return self._release(len(self._pending) - self._possible_stop(), final=False)

    def close(self) -> str:
        """The rest of the text, when no more bytes will come."""
        return "" if self.stopped else self._release(len(self._pending), final=True)

    def _release(self, size: int, *, final: bool) -> str:
        text, self._pending = self._pending[:size], self._pending[size:]
        return self._decoder.decode(text, final)

    def _possible_stop(self) -> int:
        """The length of the longest end of the pending bytes with which a stop string begins."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-size:]) for stop in self._stops):
                return size
        return 0


def whole_tokens(tokens: Sequence[int], drop: int, vocabulary: Vocabulary) -> tuple[int, int]:
    """Tokens that stay whole when the last `drop` bytes go, and bytes of the next one that stay.

    Args:
        tokens: ids that spell at least `drop` bytes.
        drop: bytes to take away from the end.
        vocabulary: the tokenizer.
    """
    count = len(tokens)
    while drop > 0:
        count -= 1
        drop -= len(vocabulary.token_bytes(tokens[count]))
    return count, -drop


def check_stop_strings(stop_strings: Sequence[str], *, caller: str | None = None) -> None:
    """Checks that these are strings that can stop a text.

    Raises:
        TypeError: one string instead of a list, or something else in it.
        ValueError: an empty string.
    """
    prefix = "" if caller is None else f"{caller}: "
    if isinstance(stop_strings, str) or not all(isinstance(stop, str) for stop in stop_strings):
        raise TypeError(f"{prefix}`stop_strings` must be a list of strings; got {stop_strings!r}.")
    if "" in stop_strings:
        raise ValueError(f"{prefix}`stop_strings` must hold no empty string; got one.")
