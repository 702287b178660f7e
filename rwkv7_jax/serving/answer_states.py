"""The states after answers, kept because a client's next prompt begins with its last answer.

When a stop string, a stop id of the request or blanks at the end of a message are cut from an
answer, the row has already read further tokens. A state cannot be rolled back, so the last tokens
before the cut are read again, from an earlier state.
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

    def keep(self, ticket: Ticket, slot: int, before: RWKV7State) -> None:
        """Caches the state after a complete answer, at the token where the client continues.

        Args:
            ticket: the request of the row.
            slot: the row.
            before: the states of all rows before the last block.
        """
        if not self._cache.is_used:
            return
        kept = ticket.kept
        # A state after more tokens than these differs from what the client will send back.
        same = min(ticket.as_drawn, len(kept))
        if same == len(kept) == ticket.read:
            state = row_state(self._slots.states(), slot)
        else:
            earlier = ticket.earlier
            if same >= ticket.block_start:
                earlier = Earlier(ticket.block_start, row_state(before, slot))
            if earlier is None or earlier.count > same:
                # More than the last block is blanks, which the client does not send back.
                return
            state = earlier.state
            if earlier.count < len(kept):
                state = self._slots.read_all(state, kept[earlier.count :])
        self._cache.keep(ticket.start.key, kept, state)
