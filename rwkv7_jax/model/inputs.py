"""The inputs of a model: lengths of rows and embeddings of tokens."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Activations, Tokens
from rwkv7_jax.checks import as_array, check_lengths, check_tokens, is_traced
from rwkv7_jax.model.casts import at_least_int32
from rwkv7_jax.model.config import RWKV7Config


def check_inputs(tokens: Any, config: RWKV7Config) -> None:
    """Checks the ids of a call, or the vectors in their place.

    Raises:
        TypeError: ids [B T] that are not integers.
        ValueError: another shape, or an id out of range.
    """
    shape = tuple(tokens.shape)
    if len(shape) == 3 and jnp.issubdtype(tokens.dtype, jnp.floating):
        if shape[2] != config.width:
            raise ValueError(
                f"`tokens` must have shape [B T {config.width}] where they are vectors; got "
                f"{shape}."
            )
        return
    if len(shape) != 2:
        raise ValueError(
            f"`tokens` must have shape [B T], or be vectors [B T D]; got {shape}."
        )
    check_tokens(tokens, config.vocab_size)


def safe_lengths(lengths: Any, tokens: tuple[int, int]) -> Any:
    """Returns lengths between 0 and T: checks concrete ones and clips traced ones.

    Args:
        lengths: the number of real tokens of each row.
        tokens: the number of rows and the number of tokens in a row (T).

    Raises:
        TypeError: the lengths are not integers.
        ValueError: not one length per row, or a length out of range.
    """
    lengths = as_array(lengths, "`lengths`")
    check_lengths(lengths, tokens)
    lengths = at_least_int32(lengths)
    if not is_traced(lengths):
        return lengths
    # With a length out of range, the token shift would be NaN or another row's.
    return jnp.clip(lengths, 0, tokens[1])


def embed(tokens: Tokens, table: Float[Array, "V D"]) -> Activations:
    """Looks up the tokens' rows of the table; ids out of range get zeros."""
    # Plain indexing would clamp large ids and wrap negative ones.
    return table.at[tokens].get(mode="fill", fill_value=0, wrap_negative_indices=False)
