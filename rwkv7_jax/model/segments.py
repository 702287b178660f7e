"""Segments: several sequences that share a row of tokens, each with a state of its own.

Sequence k of row b has row b K + k of the state. Here is what the model needs to know of them
outside the recurrence, which has its own way (`pallas_kernels.packed_rows`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import Activations, Lengths
from rwkv7_jax.checks import as_array, check_instance, is_known
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import RWKV7State, check_state


class Segments(NamedTuple):
    """Where the K sequences of each row lie.

    Attributes:
        ids: the sequence of each token, in range and never falling.
        firsts: the first token of each sequence; T or more where it has none.
        sizes: the number of tokens of each sequence.
    """

    ids: Int[Array, "B T"]
    firsts: Int[Array, "B K"]
    sizes: Int[Array, "B K"]


def _check_ids(ids: Any, shape: tuple[int, int], sequences: int) -> None:
    """Raises unless the ids fit the tokens and the state, as far as they can be read."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"`segment_ids` must be integers; got {ids.dtype}.")
    if tuple(ids.shape) != tuple(shape):
        raise ValueError(
            f"`segment_ids` must have shape {tuple(shape)}, one number a token; "
            f"got {tuple(ids.shape)}."
        )
    if not is_known(ids) or not ids.size:
        return
    values = np.asarray(ids).astype(np.int64)
    wrong = values[(values < 0) | (values >= sequences)]
    if len(wrong):
        raise ValueError(
            f"`segment_ids` must be at least 0 and below {sequences}, the rows of `state` for each "
            f"row of tokens; got {wrong[0]}."
        )
    falling = np.flatnonzero((np.diff(values, axis=1) < 0).any(axis=1))
    if len(falling):
        raise ValueError(
            "`segment_ids` must not fall from one token to the next; "
            f"row {falling[0]} does."
        )


def check_packed_state(state: RWKV7State, config: RWKV7Config) -> None:
    """Checks the state of rows that several sequences share; see `check_state`.

    Raises:
        TypeError: as `check_state`.
        ValueError: as `check_state`, or an upscaled memory that not all sequences share.
    """
    check_instance(state, RWKV7State, "`state`")
    check_state(state, state.batch, config)
    upscaled = state.upscaled
    if upscaled is None or state.batch == 1:
        return
    rows = {leaf.shape[1] for leaf in jax.tree.leaves(upscaled)}
    if upscaled.form.has_own_rows or rows != {1}:
        raise ValueError(
            "`state.upscaled` must be static and shared by all sequences with `segment_ids`; its "
            f"dynamics are {upscaled.dynamics!r}, and its arrays have {max(rows)} rows."
        )


def find_segments(
    segment_ids: Any, lengths: Lengths | None, shape: tuple[int, int], states: int
) -> Segments:
    """Finds the sequences of each row: concrete ids are checked, traced ones are put in order.

    Args:
        segment_ids: the sequence of each token.
        lengths: the number of tokens of each row that count.
        shape: the number of rows and the number of tokens in a row.
        states: sequences that the state holds.

    Raises:
        TypeError: the ids are not integers.
        ValueError: a wrong shape, ids out of range or falling, or states that the rows do not
            divide.
    """
    batch, tokens = shape
    if not batch or states < batch or states % batch:
        raise ValueError(
            f"`state` must hold a multiple of the {batch} rows with `segment_ids`; got {states}."
        )
    ids = as_array(segment_ids, "`segment_ids`")
    sequences = states // batch
    _check_ids(ids, shape, sequences)
    ids = jnp.clip(jnp.asarray(ids, jnp.int32), 0, sequences - 1)
    ids = jax.lax.cummax(ids, axis=1)
    numbers = jnp.arange(sequences, dtype=jnp.int32)
    is_token = jnp.ones(shape, bool)
    if lengths is not None:
        is_token = jnp.arange(tokens)[None] < jnp.asarray(lengths)[:, None]
    belongs = (ids[..., None] == numbers[None, None]) & is_token[..., None]
    sizes = jnp.sum(belongs, axis=1, dtype=jnp.int32)
    firsts = jnp.cumsum(sizes, axis=1, dtype=jnp.int32) - sizes
    # Past the end, each at another place: `shift` promises that none comes twice.
    firsts = jnp.where(sizes > 0, firsts, tokens + numbers[None])
    return Segments(ids, firsts, sizes)


def shift(
    x: Activations, before: Float[Array, "S D"], segments: Segments
) -> Activations:
    """Shifts by one token; each sequence's first one is preceded by its row of `before`."""
    # Scatters into rows of no tokens, and gathers from them, have no gradient in JAX.
    if not x.shape[1]:
        return x

    def one_row(x, firsts, before):
        shifted = jnp.pad(x, ((1, 0), (0, 0)))[:-1]
        return shifted.at[firsts].set(before, mode="drop", unique_indices=True)

    before = before.astype(x.dtype).reshape(*segments.firsts.shape, -1)
    return jax.vmap(one_row)(x, segments.firsts, before)


def last_tokens(
    x: Activations, before: Float[Array, "S D"], segments: Segments
) -> Float[Array, "S D"]:
    """Takes the last token of every sequence; its row of `before` where it has none."""
    if not x.shape[1]:
        return before.astype(x.dtype)

    def one_row(x, lasts):
        return x.at[lasts].get(mode="fill", fill_value=0)

    # Where there is none the place is past the end, or that of a neighbour: it is not read below.
    lasts = segments.firsts + segments.sizes - 1
    found = jax.vmap(one_row)(x, lasts).reshape(before.shape)
    is_empty = segments.sizes.reshape(-1, 1) == 0
    return jnp.where(is_empty, before.astype(x.dtype), found)
