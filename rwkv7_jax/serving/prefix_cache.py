"""A cache of states, so that a prefix which prompts share is read only once."""

import bisect
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from rwkv7_jax.model.state import RWKV7State


class Match(NamedTuple):
    """The longest cached prefix of a prompt.

    Attributes:
        length: the number of tokens in the longest cached prefix.
        state: the state after it; None if no prefix is cached.
        shared: the largest number of leading tokens that the prompt shares with a cached entry,
            which may then continue differently.
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
        """Returns the number of leading tokens that are equal."""
        length = min(len(self.tokens), len(tokens))
        differ = self.tokens[:length] != tokens[:length]
        return int(differ.argmax()) if differ.any() else length


# The key of the start state and the tokens, as bytes that sort in the order of the tokens.
_Key = tuple[int, bytes]


def _key(start: int, tokens: np.ndarray) -> _Key:
    return start, tokens.astype(">u4").tobytes()


class PrefixCache:
    """A cache of the states after prompts and answers; the least recently used are dropped.

    The keys are sorted, so a prompt is compared only with its neighbours. A lookup in the engine's
    thread stays fast with many entries.
    """

    def __init__(self, most_bytes: int):
        """Starts empty; a limit of 0 bytes disables the cache."""
        self._most_bytes = most_bytes
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._order: list[_Key] = []
        self._bytes = 0

    @property
    def is_used(self) -> bool:
        """Returns whether the cache may hold anything."""
        return self._most_bytes > 0

    def keep(self, start: int, tokens: Sequence[int], state: RWKV7State) -> None:
        """Caches the state after some tokens and drops the least recently used entries.

        Args:
            start: the key of the start state.
            tokens: the tokens read after the start state.
            state: the state of one row after them.
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
        """Finds the longest cached prefix of `tokens` after the start state with key `start`."""
        prompt = np.array(tokens, np.int32)
        at = bisect.bisect_right(self._order, _key(start, prompt))
        # In sorted order, the keys that share most with the prompt are next to its own position.
        before = self._common(at - 1, start, prompt)
        shared = max(before, self._common(at, start, prompt))
        length = before
        while length:
            # Every cached prefix of the prompt is also a prefix of the key before the prompt.
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
        """Returns how many leading tokens a prompt shares with the key at an index of the order."""
        if not 0 <= at < len(self._order) or self._order[at][0] != start:
            return 0
        return self._entries[self._order[at]].common(prompt)

    def clear(self) -> None:
        """Drops all entries."""
        self._entries.clear()
        self._order.clear()
        self._bytes = 0

    def _drop(self, key: _Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            del self._order[bisect.bisect_left(self._order, key)]
            self._bytes -= entry.bytes()
