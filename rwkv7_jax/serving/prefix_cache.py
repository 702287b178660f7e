"""States after prompts that were read before, so that what prompts share is not read again."""

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


class PrefixCache:
    """A cache of the states after prompts and answers; the least recently used are dropped."""

    def __init__(self, most_bytes: int):
        """Starts empty; with 0 bytes it stays so."""
        self._most_bytes = most_bytes
        # By the start state's key and the tokens.
        self._entries: OrderedDict[tuple[int, bytes], _Entry] = OrderedDict()
        self._bytes = 0

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
        key = (start, entry.tokens.tobytes())
        self._drop(key)
        while self._bytes + size > self._most_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = entry
        self._bytes += size

    def find(self, start: int, tokens: Sequence[int]) -> Match:
        """Finds what is cached of `tokens` after the start state with the key `start`."""
        prompt = np.array(tokens, np.int32)
        shared = 0
        found = Match(0, None, 0)
        used = None
        for key, entry in self._entries.items():
            if key[0] != start:
                continue
            common = entry.common(prompt)
            shared = max(shared, common)
            if common == len(entry.tokens) > found.length:
                found = Match(common, entry.state, 0)
                used = key
        if used is not None:
            self._entries.move_to_end(used)
        return found._replace(shared=shared)

    def clear(self) -> None:
        """Drops all."""
        self._entries.clear()
        self._bytes = 0

    def _drop(self, key: tuple[int, bytes]) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.bytes()
