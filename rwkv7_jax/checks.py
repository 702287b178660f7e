"""Argument checks shared by the public functions."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from rwkv7_jax.array_types import Lengths


def check_function(value: Any, subject: str) -> None:
    """Return if `value` can be called; `subject` begins the message about another.

    Raises:
        TypeError: it cannot.
    """
    if not callable(value):
        raise TypeError(f"{subject} must be a function; got {type(value).__name__}.")


def _check_number(value: Any, low: float, high: float, *, subject: str) -> None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{subject} must be a number; got {type(value).__name__}.") from None
    if not (math.isfinite(number) and low <= number <= high):
        raise ValueError(f"{subject} must be from {low:g} to {high:g}; got {number:g}.")


def check_count(value: Any, least: int, subject: str) -> int:
    """The integer, at least `least`; `subject` begins the message about another.

    Raises:
        TypeError: no integer.
        ValueError: too small.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{subject} must be an integer; got {type(value).__name__}.") from None
    if number < least:
        raise ValueError(f"{subject} must be at least {least}; got {number}.")
    return number


def check_ids(ids: Any, vocab_size: int, subject: str) -> np.ndarray:
    """The ids as a vector of int32, all inside the vocabulary.

    Args:
        ids: what shall be checked, on the host.
        vocab_size: ids of the model.
        subject: how the message begins: the function, and the argument in backticks.

    Raises:
        TypeError: not integers.
        ValueError: not a vector, or an id out of range; the message has its position.
    """
    array = np.asarray(ids) if len(ids) else np.zeros(0, np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{subject} must hold integers; got {array.dtype}.")
    if array.ndim != 1:
        raise ValueError(f"{subject} must be a flat list of ids; got shape {array.shape}.")
    wrong = np.flatnonzero((array < 0) | (array >= vocab_size))
    if len(wrong):
        raise ValueError(
            f"{subject} must hold ids at least 0 and below {vocab_size}; "
            f"got {array[wrong[0]]} at position {wrong[0]}."
        )
    return array.astype(np.int32)


def check_tokens(tokens: Int[Array | np.ndarray, "..."], vocab_size: int, *, caller: str) -> None:
    """Return if the ids are integers and, where they are known, inside the vocabulary.

    Raises:
        TypeError: not integers.
        ValueError: an id is out of range; the message has its position.
    """
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{caller}: `tokens` must be integers; got {tokens.dtype}.")
    if isinstance(tokens, jax.core.Tracer):
        return
    ids = np.asarray(tokens)
    wrong = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        position = tuple(int(i) for i in wrong[0])
        raise ValueError(
            f"{caller}: `tokens` must be at least 0 and below {vocab_size}; "
            f"got {ids[position]} at position {position}."
        )


def check_lengths(
    lengths: Lengths, tokens: tuple[int, int], *, caller: str, name: str = "lengths"
) -> None:
    """Return if `lengths` are integers, one a row and, where they are known, inside the rows.

    Args:
        lengths: tokens that count.
        tokens: rows and tokens of a row.
        caller: the public function's name, for the message.
        name: the argument's.

    Raises:
        TypeError: not integers.
        ValueError: another number of rows, or a length that the rows do not have.
    """
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{caller}: `{name}` must be integers; got {lengths.dtype}.")
    if tuple(lengths.shape) != tokens[:1]:
        raise ValueError(
            f"{caller}: `{name}` must have one number for each of {tokens[0]} rows; "
            f"got shape {tuple(lengths.shape)}."
        )
    if isinstance(lengths, jax.core.Tracer):
        return
    wrong = np.flatnonzero((np.asarray(lengths) < 0) | (np.asarray(lengths) > tokens[1]))
    if len(wrong):
        raise ValueError(
            f"{caller}: `{name}` must lie between 0 and {tokens[1]}; "
            f"got {int(lengths[wrong[0]])} in row {wrong[0]}."
        )


def check_prompts(
    prompts: Any, vocab_size: int, *, caller: str, name: str = "prompts"
) -> list[list[int]]:
    """The prompts as lists of ids; `name` is the argument's in messages.

    Raises:
        ValueError: none, an empty one, or an id outside the vocabulary.
        TypeError: ids that are no integers, or one flat list.
    """
    if not isinstance(prompts, Sequence | np.ndarray) or isinstance(prompts, str | bytes):
        kind = type(prompts).__name__
        raise TypeError(f"{caller}: `{name}` must be a list of lists of ids; got {kind}.")
    if not len(prompts):
        raise ValueError(f"{caller}: `{name}` must hold a prompt; got 0.")
    rows = []
    for index, ids in enumerate(prompts):
        subject = f"{caller}: `{name}` row {index}"
        if isinstance(ids, str | bytes) or not isinstance(ids, Sequence | np.ndarray | Array):
            raise TypeError(f"{subject} must be a list of ids; got {type(ids).__name__}.")
        rows.append(check_ids(ids, vocab_size, subject).tolist())
        if not rows[-1]:
            raise ValueError(f"{subject} must hold an id ([0] begins a text); got 0.")
    return rows


def typed_key(key: Any, *, caller: str) -> Array:
    """The random key or keys, typed.

    Raises:
        TypeError: no array.
    """
    if not isinstance(key, jax.Array):
        raise TypeError(f"{caller}: `key` must be a random key; got {type(key).__name__}.")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key)
