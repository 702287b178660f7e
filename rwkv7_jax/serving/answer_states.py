"""The states after answers: what a client sends back begins with its last answer.

After a stop string, or a stop id of the request, a row has read further tokens. A state cannot be
rolled back, so the last tokens that stay are read again, from a state before them.
"""

from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.serving.prefix_cache import PrefixCache
from rwkv7_jax.serving.slots import Slots, row_state
from rwkv7_jax.serving.ticket import Earlier, Ticket


class AnswerStates:
    """Keeps the states after answers in a cache."""

    def __init__(self, slots: Slots, cache: PrefixCache):
        """Takes the rows that answer, and the cache."""
        self._slots = slots
        self._cache = cache

    def note_block(self, ticket: Ticket, slot: int, before: RWKV7State) -> None:
        """Copies a row's state from before a block of which a stop string may cut tokens.

        Args:
            ticket: whose row.
            slot: the row.
            before: states of all rows before the block.
        """
        if not self._cache.is_used:
            return
        if ticket.certain == ticket.read:
            ticket.earlier = None
        elif ticket.certain >= ticket.block_start:
            state = row_state(before, slot)
            ticket.earlier = Earlier(ticket.block_start, state)
        # Otherwise the one that is there is from before all that may be cut.

    def keep(self, ticket: Ticket, slot: int) -> None:
        """Keeps the state after the tokens of an answer that is complete."""
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
