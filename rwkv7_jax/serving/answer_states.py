"""The states after answers, kept because a client's next prompt begins with its last answer.

When a stop string or a stop id of the request ends an answer, the row may already have read further
tokens. A state cannot be rolled back, so the last tokens before the stop are read again, from an
earlier state.
"""

from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.serving.prefix_cache import PrefixCache
from rwkv7_jax.serving.slots import Slots, row_state
from rwkv7_jax.serving.ticket import Earlier, Ticket


class AnswerStates:
    """The states after answers, in a cache."""

    def __init__(self, slots: Slots, cache: PrefixCache):
        """Stores the rows and the cache."""
        self._slots = slots
        self._cache = cache

    def note_block(self, ticket: Ticket, slot: int, before: RWKV7State) -> None:
        """Copies the state that a row had before a block if a stop string may cut its tokens.

        Args:
            ticket: the request of the row.
            slot: the row.
            before: the states of all rows before the block.
        """
        if not self._cache.is_used:
            return
        if ticket.certain == ticket.read:
            ticket.earlier = None
        elif ticket.certain >= ticket.block_start:
            state = row_state(before, slot)
            ticket.earlier = Earlier(ticket.block_start, state)
        # Otherwise `earlier` already precedes all tokens that may be cut.

    def keep(self, ticket: Ticket, slot: int) -> None:
        """Caches the state after the tokens of a complete answer."""
        if not self._cache.is_used:
            return
        kept = ticket.kept
        if ticket.read == len(kept):
            state = row_state(self._slots.states(), slot)
        else:
            assert ticket.earlier is not None
            count, state = ticket.earlier
            if count < len(kept):
                state = self._slots.read(state, kept[count:])
        self._cache.keep(ticket.start.key, kept, state)
