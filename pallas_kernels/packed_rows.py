"""Several sequences in one row: where their chunks lie, and how tokens move there and back.

All implementations work chunk by chunk. The tokens are therefore moved so that every sequence
begins a new chunk, and zeros fill its last chunk. The K sequences of a row have K states. A chunk
reads its sequence's state and writes it back, so no information passes between sequences.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.reference import State, WKVInputs

# The sequence, from 0 to K - 1, of each chunk of a row; sorted.
Owners = Int[Array, "B C"]


class Places(NamedTuple):
    """Where the tokens of packed rows go.

    Attributes:
        sources: the token in each slot of the chunks; out of range for an empty slot.
        slots: the slot of each token; out of range for padding.
        owners: the sequence of each chunk. Empty chunks at a row's end belong to the last sequence.
    """

    sources: Int[Array, "B TC"]
    slots: Int[Array, "B T"]
    owners: Owners


def find_places(
    segment_ids: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None,
    *,
    sequences: int,
    chunk: int,
) -> Places:
    """Computes where the tokens of each row go.

    Args:
        segment_ids: the sequence of each token.
        lengths: the number of real tokens of each row; None for all.
        sequences: sequences of a row (K).
        chunk: tokens of a chunk.
    """
    batch, tokens = segment_ids.shape
    if lengths is None:
        lengths = jnp.full(batch, tokens, jnp.int32)

    def one_row(ids, length):
        return _find_in_row(ids, length, sequences, chunk)

    return jax.vmap(one_row)(segment_ids.astype(jnp.int32), lengths.astype(jnp.int32))


def _find_in_row(
    ids: Int[Array, " T"], length: Int[Array, ""], sequences: int, chunk: int
) -> Places:
    """Computes the places of one row, without the axis B."""
    tokens = ids.shape[0]
    token = jnp.arange(tokens, dtype=jnp.int32)
    # Clips ids to the range; one that decreases counts as the largest before it.
    ids = jax.lax.cummax(jnp.clip(ids, 0, sequences - 1))
    is_token = token < length
    numbers = jnp.arange(sequences, dtype=jnp.int32)
    belongs = (ids[:, None] == numbers[None]) & is_token[:, None]
    # The numbers of tokens and chunks of each sequence, and where its first ones lie.
    sizes = jnp.sum(belongs, axis=0, dtype=jnp.int32)
    chunks = -(-sizes // chunk)
    next_chunks = jnp.cumsum(chunks, dtype=jnp.int32)
    first_tokens = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    first_slots = (next_chunks - chunks) * chunk
    # Room for the worst case: every sequence's last chunk holds a single token.
    columns = (tokens + sequences * (chunk - 1)) // chunk
    column = jnp.arange(columns, dtype=jnp.int32)
    has_ended = next_chunks[None] <= column[:, None]
    owners = jnp.minimum(jnp.sum(has_ended, axis=1, dtype=jnp.int32), sequences - 1)

    slot = jnp.arange(columns * chunk, dtype=jnp.int32)
    owner = jnp.repeat(owners, chunk)
    inside = slot - first_slots[owner]
    is_filled = inside < sizes[owner]
    # Places out of range differ from each other: `move` promises unique indices.
    return Places(
        sources=jnp.where(is_filled, first_tokens[owner] + inside, tokens + slot),
        slots=jnp.where(
            is_token,
            (first_slots - first_tokens)[ids] + token,
            columns * chunk + token,
        ),
        owners=owners,
    )


def move(
    x: Float[Array, "B T H N"], places: Int[Array, "B U"]
) -> Float[Array, "B U H N"]:
    """Gathers the vectors of each row at these places; zeros for places out of range."""

    def pick(row, places):
        return row.at[places].get(mode="fill", fill_value=0, unique_indices=True)

    return jax.vmap(pick)(x, places)


def move_inputs(inputs: WKVInputs, places: Places) -> WKVInputs:
    """Moves all tokens to their slots; empty slots get zeros, which change no state or gradient."""
    return jax.tree.map(lambda x: move(x, places.sources), inputs)


def _by_row(states: Float[Array, "S ..."], rows: int) -> Float[Array, "B K ..."]:
    return states.reshape(rows, -1, *states.shape[1:])


def read(states: State, owner: Int[Array, " B"] | None) -> Float[Array, "B H Nv Nk"]:
    """Selects the state of one sequence of each row; all states if each row is one sequence."""
    if owner is None:
        return states
    return jax.vmap(lambda row, i: row[i])(_by_row(states, owner.shape[0]), owner)


def write(
    states: State, owner: Int[Array, " B"] | None, new: Float[Array, "B H Nv Nk"]
) -> State:
    """Replaces the state of one sequence of each row."""
    if owner is None:
        return new
    table = _by_row(states, owner.shape[0])
    table = jax.vmap(lambda row, i, x: row.at[i].set(x))(table, owner, new)
    return table.reshape(states.shape)


def chunk_spans(owners: Owners, sequences: int) -> Int[Array, "S 2"]:
    """Computes the first chunk of every sequence and the one after its last."""
    number = jnp.arange(sequences, dtype=jnp.int32)[None, None]
    first = jnp.sum(owners[..., None] < number, axis=1, dtype=jnp.int32)
    end = jnp.sum(owners[..., None] <= number, axis=1, dtype=jnp.int32)
    return jnp.stack([first, end], axis=-1).reshape(-1, 2)
