"""Segments: several sequences that share a row of tokens, each with its own state.

Sequence k of row b has row b K + k of the state. This module serves the token shift; the
recurrence handles segments in `pallas_kernels.packed_rows`.
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
        ids: the sequence of each token, in range and not decreasing.
        firsts: the first token of each sequence; T or more where it has none.
        sizes: the number of tokens of each sequence.
    """

    ids: Int[Array, "B T"]
    firsts: Int[Array, "B K"]
    sizes: Int[Array, "B K"]


def _check_ids(ids: Any, shape: tuple[int, int], sequences: int) -> None:
    """Raises unless the ids match the tokens; concrete ids must be in range and not decrease."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"`segment_ids` must be integers; got {ids.dtype}.")
    if tuple(ids.shape) != tuple(shape):
        raise ValueError(
            f"`segment_ids` must have shape {tuple(shape)}, one number per token; "
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
    decreasing = np.flatnonzero((np.diff(values, axis=1) < 0).any(axis=1))
    if len(decreasing):
        raise ValueError(
            "`segment_ids` must not decrease from one token to the next; "
            f"row {decreasing[0]} does."
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
    """Finds the sequences of each row: checks concrete ids, and clips and sorts traced ones.

    Args:
        segment_ids: the sequence of each token.
        lengths: the number of real tokens of each row.
        shape: the number of rows and the number of tokens in a row.
        states: the number of sequences in the state.

    Raises:
        TypeError: the ids are not integers.
        ValueError: a wrong shape, ids that are out of range or decrease, or states that the rows do
            not divide.
    """
    batch, tokens = shape
    if not batch or states < batch or states % batch:
        raise ValueError(
            f"`state` must hold a multiple of {batch} sequences, the rows of tokens, with "
            f"`segment_ids`; got {states}."
        )
    ids = as_array(segment_ids, "`segment_ids`")
    sequences = states // batch
    _check_ids(ids, shape, sequences)
    ids = jnp.clip(jnp.asarray(ids, jnp.int32), 0, sequences - 1)
    ids = jax.lax.cummax(ids, axis=1)
    numbers = jnp.arange(sequences, dtype=jnp.int32)
    is_token = jnp.ones(shape, bool)
    if lengths is not None:
        places = jnp.arange(tokens, dtype=jnp.int32)[None]
        is_token = places < jnp.asarray(lengths)[:, None]
    belongs = (ids[..., None] == numbers[None, None]) & is_token[..., None]
    sizes = jnp.sum(belongs, axis=1, dtype=jnp.int32)
    firsts = jnp.cumsum(sizes, axis=1, dtype=jnp.int32) - sizes
    # Out of range and distinct: `shift` promises unique indices.
    firsts = jnp.where(sizes > 0, firsts, tokens + numbers[None])
    return Segments(ids, firsts, sizes)


def shift(
    x: Activations, before: Float[Array, "S D"], segments: Segments
) -> Activations:
    """Shifts by one token; the predecessor of a sequence's first token is its row of `before`."""
    # JAX cannot differentiate scatters into empty rows or gathers from them.
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
    """Takes the last token of every sequence, or its row of `before` if it has none."""
    if not x.shape[1]:
        return before.astype(x.dtype)

    def one_row(x, lasts):
        return x.at[lasts].get(mode="fill", fill_value=0)

    # An empty sequence's index is out of range or a neighbour's; the result is not used below.
    lasts = segments.firsts + segments.sizes - 1
    found = jax.vmap(one_row)(x, lasts).reshape(before.shape)
    is_empty = segments.sizes.reshape(-1, 1) == 0
    return jnp.where(is_empty, before.astype(x.dtype), found)
