"""The states after answers: what a client sends back begins with its last answer.

After a stop string, a stop id of the request, or blanks that end a message, a row has read further
tokens. A state cannot be rolled back, so the last tokens that stay are read again, from a state
before them.
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
        """Copies a row's state from before a block of which a stop string may still cut tokens.

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

    def keep(self, ticket: Ticket, slot: int, before: RWKV7State) -> None:
        """Keeps the state after an answer that is complete, at the token where it comes back.

        Args:
            ticket: whose row.
            slot: the row.
            before: states of all rows before the last block.
        """
        if not self._cache.is_used:
            return
        kept = ticket.kept
        # A state from after these has read something else than the client sends back.
        same = min(ticket.as_drawn, len(kept))
        if same == len(kept) == ticket.read:
            state = row_state(self._slots.states(), slot)
        else:
            earlier = ticket.earlier
            if same >= ticket.block_start:
                earlier = Earlier(ticket.block_start, row_state(before, slot))
            if earlier is None or earlier.count > same:
                # Blanks that do not come back fill more than the last block.
                return
            state = earlier.state
            if earlier.count < len(kept):
                state = self._slots.read(state, kept[earlier.count :])
        self._cache.keep(ticket.start.key, kept, state)
