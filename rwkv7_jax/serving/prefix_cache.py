"""States after prompts that were read before, so that what prompts share is not read again."""

import bisect
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from rwkv7_jax.model.state import RWKV7State


class Match(NamedTuple):
    """What a cache knows of a prompt.

    Attributes:
        length: tokens of the longest prefix that is cached.
        state: after them; None if nothing is cached.
        shared: tokens that the prompt has in common with another one, which may be longer than it.
    """

    length: int
    state: RWKV7State | None
    shared: int


class _Entry(NamedTuple):
    tokens: np.ndarray
    state: RWKV7State

    def bytes(self) -> int:
        leaves = jax.tree.leaves(self.state)
        return self.tokens.nbytes + sum(leaf.nbytes for leaf in leaves)

    def common(self, tokens: np.ndarray) -> int:
        """Counts the leading tokens that are the same."""
        length = min(len(self.tokens), len(tokens))
        differ = self.tokens[:length] != tokens[:length]
        return int(differ.argmax()) if differ.any() else length


# The start state's key and the tokens, as bytes whose order is that of the tokens.
_Key = tuple[int, bytes]


def _key(start: int, tokens: np.ndarray) -> _Key:
    return start, tokens.astype(">u4").tobytes()


class PrefixCache:
    """A cache of the states after prompts and answers; the least recently used are dropped.

    The keys are kept in order, so that a prompt is compared with those next to it alone: the
    engine's thread looks for every request, whatever the number of entries.
    """

    def __init__(self, most_bytes: int):
        """Starts empty; with 0 bytes it stays so."""
        self._most_bytes = most_bytes
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._order: list[_Key] = []
        self._bytes = 0

    @property
    def is_used(self) -> bool:
        """Tells whether anything may be kept."""
        return self._most_bytes > 0

    def keep(self, start: int, tokens: Sequence[int], state: RWKV7State) -> None:
        """Keeps the state after tokens; those that were used longest ago make room for it.

        Args:
            start: key of the start state.
            tokens: that were read after it.
            state: of one row.
        """
        entry = _Entry(np.array(tokens, np.int32), state)
        size = entry.bytes()
        if size > self._most_bytes or not tokens:
            return
        key = _key(start, entry.tokens)
        self._drop(key)
        while self._bytes + size > self._most_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = entry
        bisect.insort(self._order, key)
        self._bytes += size

    def find(self, start: int, tokens: Sequence[int]) -> Match:
        """Finds what is cached of `tokens` after the start state with the key `start`."""
        prompt = np.array(tokens, np.int32)
        at = bisect.bisect_right(self._order, _key(start, prompt))
        # Keys that begin like the prompt stand together, nearest to where it would stand itself.
        before = self._common(at - 1, start, prompt)
        shared = max(before, self._common(at, start, prompt))
        length = before
        while length:
            # A prefix of the prompt that is cached begins the key before the prompt, too.
            at = bisect.bisect_right(self._order, _key(start, prompt[:length]))
            common = self._common(at - 1, start, prompt[:length])
            key = self._order[at - 1]
            entry = self._entries[key]
            if common == len(entry.tokens):
                self._entries.move_to_end(key)
                return Match(common, entry.state, shared)
            length = common
        return Match(0, None, shared)

    def _common(self, at: int, start: int, prompt: np.ndarray) -> int:
        """Counts the leading tokens that a prompt shares with the key at a place in the order."""
        if not 0 <= at < len(self._order) or self._order[at][0] != start:
            return 0
        return self._entries[self._order[at]].common(prompt)

    def clear(self) -> None:
        """Drops all."""
        self._entries.clear()
        self._order.clear()
        self._bytes = 0

    def _drop(self, key: _Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            del self._order[bisect.bisect_left(self._order, key)]
            self._bytes -= entry.bytes()
