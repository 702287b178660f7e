"""Several sequences in one row: where their chunks lie, and the way in and out.

All implementations work chunk by chunk. So the tokens are moved until every sequence begins with a
chunk of its own, and zeros fill its last chunk. The K sequences of a row have K states. A chunk
reads the state of its sequence and writes it back, so that nothing passes between sequences.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.reference import State, WKVInputs

# The sequence, from 0 to K - 1, that each chunk of a row belongs to. They never decrease.
Owners = Int[Array, "B C"]


class Places(NamedTuple):
    """Where the tokens of packed rows go.

    Attributes:
        sources: the token that each slot of the chunks holds; past the last one where it is empty.
        slots: the slot of each token; past the last one for tokens that do not count.
        owners: the sequence of each chunk. Empty chunks at a row's end belong to the last one.
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
        lengths: the number of tokens of each row that count; None for all.
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
    """Computes `find_places` of one row, without the axis B."""
    tokens = ids.shape[0]
    token = jnp.arange(tokens, dtype=jnp.int32)
    # What is out of range counts as the nearest, and what falls as the largest before it.
    ids = jax.lax.cummax(jnp.clip(ids, 0, sequences - 1))
    is_token = token < length
    belongs = (ids[:, None] == jnp.arange(sequences)[None]) & is_token[:, None]
    # Of each sequence: its tokens and chunks, and where the first of them lies.
    sizes = jnp.sum(belongs, axis=0, dtype=jnp.int32)
    chunks = -(-sizes // chunk)
    next_chunks = jnp.cumsum(chunks, dtype=jnp.int32)
    first_tokens = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    first_slots = (next_chunks - chunks) * chunk
    # Every sequence may end with a chunk that holds a single token.
    columns = (tokens + sequences * (chunk - 1)) // chunk
    has_ended = next_chunks[None] <= jnp.arange(columns)[:, None]
    owners = jnp.minimum(jnp.sum(has_ended, axis=1, dtype=jnp.int32), sequences - 1)

    slot = jnp.arange(columns * chunk, dtype=jnp.int32)
    owner = jnp.repeat(owners, chunk)
    inside = slot - first_slots[owner]
    is_filled = inside < sizes[owner]
    # Each place out of range is another one: `move` promises that none comes twice.
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
    """Picks the vectors of each row at these places, zeros where a place is out of range."""

    def pick(row, places):
        return row.at[places].get(mode="fill", fill_value=0, unique_indices=True)

    return jax.vmap(pick)(x, places)


def move_inputs(inputs: WKVInputs, places: Places) -> WKVInputs:
    """Moves all tokens to their slots; a token of zeros changes neither a state nor a gradient."""
    return jax.tree.map(lambda x: move(x, places.sources), inputs)


def _by_row(states: Float[Array, "S ..."], rows: int) -> Float[Array, "B K ..."]:
    return states.reshape(rows, -1, *states.shape[1:])


def read(states: State, owner: Int[Array, " B"] | None) -> Float[Array, "B H Nv Nk"]:
    """Picks the state of one sequence of each row; all states where each row is a sequence."""
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
