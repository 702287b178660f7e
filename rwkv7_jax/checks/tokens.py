"""Checks of token ids, of the lengths of their rows, and of prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from rwkv7_jax.array_types import Lengths
from rwkv7_jax.checks.arrays import is_known


def check_ids(ids: Any, vocab_size: int, argument: str) -> np.ndarray:
    """Checks that token ids are inside the vocabulary, and returns them as an int32 vector.

    Args:
        ids: a flat sequence of ids, on the host.
        vocab_size: the size of the vocabulary.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the ids are not integers.
        ValueError: the ids are not flat, or one is out of range; the message gives its position.
    """
    if (
        isinstance(ids, str | bytes)
        or not hasattr(ids, "__len__")
        or isinstance(ids, Mapping)
    ):
        raise TypeError(f"{argument} must be a list of ids; got {type(ids).__name__}.")
    if np.ndim(ids) == 0 and hasattr(ids, "dtype"):
        raise ValueError(f"{argument} must be a flat list of ids; got shape ().")
    # NumPy would convert a set to a single object.
    ids = sorted(ids) if isinstance(ids, set | frozenset) else ids
    # NumPy would convert an empty list to float64.
    try:
        array = np.asarray(ids) if len(ids) else np.zeros(0, np.int32)
    except ValueError:
        raise ValueError(
            f"{argument} must be a flat list of ids; got nested lists."
        ) from None
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{argument} must hold integers; got {array.dtype}.")
    if array.ndim != 1:
        raise ValueError(
            f"{argument} must be a flat list of ids; got shape {array.shape}."
        )
    wrong = np.flatnonzero((array < 0) | (array >= vocab_size))
    if len(wrong):
        position = wrong[0]
        raise ValueError(
            f"{argument} must hold ids at least 0 and below {vocab_size}; "
            f"got {array[position]} at position {position}."
        )
    return array.astype(np.int32)


def check_tokens(
    tokens: Int[Array | np.ndarray | jax.ShapeDtypeStruct, "..."],
    vocab_size: int,
    argument: str = "`tokens`",
) -> None:
    """Checks that token ids are integers inside the vocabulary.

    For traced ids, only the dtype is checked.

    Args:
        tokens: the ids.
        vocab_size: the size of the vocabulary.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the ids are not integers.
        ValueError: an id is out of range; the message gives its position.
    """
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{argument} must be integers; got {tokens.dtype}.")
    if not is_known(tokens):
        return
    ids = np.asarray(tokens)
    wrong = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        position = tuple(wrong[0].tolist())
        raise ValueError(
            f"{argument} must be at least 0 and below {vocab_size}; "
            f"got {ids[position]} at position {position}."
        )


def check_lengths(
    lengths: Lengths,
    tokens: tuple[int, int],
    argument: str = "`lengths`",
) -> None:
    """Checks that `lengths` has one integer for each row, from 0 to the length of the rows.

    Args:
        lengths: the number of real tokens of each row.
        tokens: the number of rows and the number of tokens in a row.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the lengths are not integers.
        ValueError: not one length per row, or a length out of range.
    """
    rows, tokens_per_row = tokens
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{argument} must be integers; got {lengths.dtype}.")
    if tuple(lengths.shape) != (rows,):
        raise ValueError(
            f"{argument} must have one number for each of {rows} rows; "
            f"got shape {tuple(lengths.shape)}."
        )
    if not is_known(lengths):
        return
    values = np.asarray(lengths)
    wrong = np.flatnonzero((values < 0) | (values > tokens_per_row))
    if len(wrong):
        row = wrong[0]
        raise ValueError(
            f"{argument} must lie between 0 and {tokens_per_row}; got {values[row]} in row {row}."
        )


def check_prompts(
    prompts: Any, vocab_size: int, argument: str = "`prompts`"
) -> list[list[int]]:
    """Checks prompts and returns them as lists of ids.

    Args:
        prompts: a list of prompts, each a non-empty list of ids.
        vocab_size: the size of the vocabulary.
        argument: the argument in backticks; the message begins with it.

    Raises:
        ValueError: no prompt, an empty prompt, or an id outside the vocabulary.
        TypeError: the ids are not integers, or `prompts` is a single flat list.
    """
    if not isinstance(prompts, Sequence | np.ndarray) or isinstance(
        prompts, str | bytes
    ):
        kind = type(prompts).__name__
        raise TypeError(f"{argument} must be a list of lists of ids; got {kind}.")
    if not len(prompts):
        raise ValueError(f"{argument} must hold a prompt; got 0.")
    rows = []
    for index, ids in enumerate(prompts):
        row = f"{argument} row {index}"
        if isinstance(ids, str | bytes) or not isinstance(
            ids, Sequence | np.ndarray | Array
        ):
            raise TypeError(f"{row} must be a list of ids; got {type(ids).__name__}.")
        checked = check_ids(ids, vocab_size, row).tolist()
        if not checked:
            raise ValueError(f"{row} must hold an id ([0] begins a text); got 0.")
        rows.append(checked)
    return rows


def check_tokenizer(tokenizer: Any, *names: str) -> None:
    """Checks that a value has what a function uses of a tokenizer.

    Args:
        tokenizer: the value; any class may be a tokenizer.
        *names: the attributes that the function uses.

    Raises:
        TypeError: an attribute is missing.
    """
    if not all(hasattr(tokenizer, name) for name in names):
        raise TypeError(
            f"`tokenizer` must be a Tokenizer; got {type(tokenizer).__name__}."
        )
