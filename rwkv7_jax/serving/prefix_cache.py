"""States after prompts that were read before, so that a conversation is not read again."""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import jax

from rwkv7_jax.model.state import RWKV7State


class Prefix(NamedTuple):
    """A key of the cache.

    Attributes:
        name: of the start state; None is no state.
        tokens: that were read after it.
    """

    name: str | None
    tokens: tuple[int, ...]


class Found(NamedTuple):
    """A hit in the cache.

    Attributes:
        length: tokens of the prefix.
        state: after them.
    """

    length: int
    state: RWKV7State


class PrefixCache:
    """A cache of the states after prompts and answers; the least recently used are dropped."""

    def __init__(self, most_bytes: int):
        """Starts empty; with 0 bytes it stays so."""
        self._most_bytes = most_bytes
        self._states: OrderedDict[Prefix, RWKV7State] = OrderedDict()
        # How many of the prefixes have a length: those are the only ones to look for.
        self._lengths: Counter[int] = Counter()
        self._bytes = 0

    def keep(self, prefix: Prefix, state: RWKV7State) -> None:
        """Keeps the state after a prefix; those that were used longest ago make room for it."""
        size = _bytes_of(state)
        if size > self._most_bytes or not prefix.tokens:
            return
        self._drop(prefix)
        while self._bytes + size > self._most_bytes:
            self._drop(next(iter(self._states)))
        self._states[prefix] = state
        self._lengths[len(prefix.tokens)] += 1
        self._bytes += size

    def longest(self, name: str | None, tokens: Sequence[int]) -> Found | None:
        """Finds the longest cached prefix of `tokens` after the start state `name`."""
        for length in sorted(self._lengths, reverse=True):
            if length > len(tokens):
                continue
            prefix = Prefix(name, tuple(tokens[:length]))
            if prefix in self._states:
                self._states.move_to_end(prefix)
                return Found(length, self._states[prefix])
        return None

    def clear(self) -> None:
        """Forgets all."""
        for prefix in list(self._states):
            self._drop(prefix)

    def _drop(self, prefix: Prefix) -> None:
        state = self._states.pop(prefix, None)
        if state is None:
            return
        length = len(prefix.tokens)
        self._lengths[length] -= 1
        if not self._lengths[length]:
            del self._lengths[length]
        self._bytes -= _bytes_of(state)


def _bytes_of(state: RWKV7State) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))
