"""Requests whose prompts are being read, a chunk at a time."""

import dataclasses
from collections.abc import Callable

from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.serving.prefix_cache import PrefixCache
from rwkv7_jax.serving.slots import Slots
from rwkv7_jax.serving.ticket import Ticket

# Prompts must share this many more tokens than are cached for another state to be worth its memory.
_LEAST_FORK = 32


@dataclasses.dataclass(eq=False)
class Reader:
    """A prompt in prefill.

    Attributes:
        ticket: the request of the prompt.
        state: the state of one row.
        position: the number of prompt tokens that the state has read.
        fork: the number of leading tokens shared with an earlier prompt if the state after them is
            to be cached; otherwise 0.
        is_begun: whether a cached state was looked for.
    """

    ticket: Ticket
    state: RWKV7State
    position: int = 0
    fork: int = 0
    is_begun: bool = False

    @property
    def last(self) -> int:
        """The number of tokens to read: the row reads the last one, to get its logits."""
        return len(self.ticket.request.prompt) - 1

    def next_chunk(self, most: int) -> tuple[int, ...]:
        """Returns the next tokens to read, at most `most`; a fork ends a chunk."""
        end = min(self.position + most, self.last)
        if self.position < self.fork:
            end = min(end, self.fork)
        return self.ticket.request.prompt[self.position : end]


class Prompts:
    """The prompts in prefill. Each stays until it gets a row; there are free rows for all."""

    def __init__(self, slots: Slots, cache: PrefixCache):
        """Starts with no prompt.

        Args:
            slots: reads the chunks.
            cache: the states after prompts that were read before.
        """
        self._slots = slots
        self._cache = cache
        self._readers: list[Reader] = []

    def __len__(self) -> int:
        """Returns the number of prompts."""
        return len(self._readers)

    def add(self, ticket: Ticket) -> None:
        """Adds the prompt of a request."""
        self._readers.append(Reader(ticket, ticket.start.state))

    def remove(self, is_gone: Callable[[Ticket], bool]) -> list[Ticket]:
        """Removes and returns the requests for which `is_gone` is true."""
        gone = [one.ticket for one in self._readers if is_gone(one.ticket)]
        self._readers = [one for one in self._readers if one.ticket not in gone]
        return gone

    def read_chunks(self) -> list[Reader]:
        """Prefills a chunk of each prompt, those of one width together.

        Returns:
            The prompts that are read to their end, which stay until they are removed.
        """
        groups: dict[int, list[Reader]] = {}
        for reader in self._readers:
            if not reader.is_begun:
                self._begin_from_cache(reader)
            chunk = reader.next_chunk(self._slots.chunk)
            if not chunk:
                self._keep(reader)
                continue
            width = self._slots.width_of(len(chunk))
            groups.setdefault(width, []).append(reader)
            # Read at once, so that the next prompt finds the cached states of these.
            if len(groups[width]) == self._slots.rows_of(width):
                self._read_together(groups.pop(width))
        for readers in groups.values():
            self._read_together(readers)
        return [one for one in self._readers if one.position == one.last]

    def _begin_from_cache(self, reader: Reader) -> None:
        """Starts from the state that has read the longest cached prefix of a prompt."""
        reader.is_begun = True
        ticket = reader.ticket
        match = self._cache.find(ticket.start.key, ticket.request.prompt[:-1])
        reader.position = match.length
        if match.shared >= match.length + _LEAST_FORK:
            reader.fork = match.shared
        ticket.cached_tokens = match.length
        if match.state is not None:
            reader.state = match.state

    def _read_together(self, readers: list[Reader]) -> None:
        """Prefills chunks of one width, one of each prompt."""
        chunks = [reader.next_chunk(self._slots.chunk) for reader in readers]
        states = self._slots.read([reader.state for reader in readers], chunks)
        for reader, chunk, state in zip(readers, chunks, states, strict=True):
            reader.state = state
            reader.position += len(chunk)
            self._keep(reader)

    def _keep(self, reader: Reader) -> None:
        """Caches the state after a chunk if another prompt may need it."""
        # Another prompt continued differently from the fork; a third one may, too.
        if reader.position in (reader.last, reader.fork):
            ticket = reader.ticket
            read = ticket.request.prompt[: reader.position]
            self._cache.keep(ticket.start.key, read, reader.state)
