"""Argument checks shared by the public functions.

A check knows the argument and not the function that the user called: its message begins with the
argument in backticks. The public function adds its own name, once, with `prefix_errors`.
"""

import contextlib
import contextvars
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from rwkv7_jax.array_types import Lengths

_inside = contextvars.ContextVar("a `prefix_errors` block is active", default=False)


@contextlib.contextmanager
def prefix_errors(function: str) -> Iterator[None]:
    """Puts "function: " before the message of an error that an argument check raises.

    Put it around the checks at the top of a public function, not around its work: whatever fails
    later should name the function in which it fails. The outermost block wins, so a public function
    may check its arguments with the help of another one. Type and traceback stay as they are.

    Args:
        function: the name of the public function, for messages.
    """
    if _inside.get():
        yield
        return
    token = _inside.set(True)
    try:
        yield
    except (TypeError, ValueError) as error:
        # Subclasses such as UnicodeDecodeError make their message from other arguments.
        if type(error) in (TypeError, ValueError):
            error.args = (f"{function}: {error}", *error.args[1:])
        raise
    finally:
        _inside.reset(token)


def check_function(value: Any, argument: str) -> None:
    """Checks that a value can be called.

    Args:
        value: the value to check.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the value cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{argument} must be a function; got {type(value).__name__}.")


def check_number(
    value: Any,
    low: float,
    high: float,
    argument: str,
) -> None:
    """Checks that a value is a finite number in a closed interval.

    Args:
        value: the value to check.
        low: the smallest allowed number.
        high: the largest allowed number.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the value is not a number.
        ValueError: the number is outside the interval, or not finite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{argument} must be a number; got {type(value).__name__}."
        ) from None
    if not (math.isfinite(number) and low <= number <= high):
        raise ValueError(
            f"{argument} must be from {low:g} to {high:g}; got {number:g}."
        )


def check_count(value: Any, least: int, argument: str) -> int:
    """Returns a value as an integer of at least `least`.

    Args:
        value: the value to check.
        least: the smallest allowed integer.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the value is not an integer.
        ValueError: the integer is too small.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{argument} must be an integer; got {type(value).__name__}."
        ) from None
    if number < least:
        raise ValueError(f"{argument} must be at least {least}; got {number}.")
    return number


def check_ids(ids: Any, vocab_size: int, argument: str) -> np.ndarray:
    """Returns token ids as an int32 vector, all of them inside the vocabulary.

    Args:
        ids: a flat sequence of ids, on the host.
        vocab_size: the number of ids that the model has.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the ids are not integers.
        ValueError: the ids are not flat, or one is out of range; the message gives its position.
    """
    # NumPy makes an empty list float64, so the empty case needs its dtype by hand.
    array = np.asarray(ids) if len(ids) else np.zeros(0, np.int32)
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


def check_tokens(tokens: Int[Array | np.ndarray, "..."], vocab_size: int) -> None:
    """Checks that token ids are integers inside the vocabulary.

    The values of traced ids are unknown: of these only the dtype is checked.

    Raises:
        TypeError: the ids are not integers.
        ValueError: an id is out of range; the message gives its position.
    """
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"`tokens` must be integers; got {tokens.dtype}.")
    if isinstance(tokens, Tracer):
        return
    ids = np.asarray(tokens)
    wrong = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        position = tuple(wrong[0].tolist())
        raise ValueError(
            f"`tokens` must be at least 0 and below {vocab_size}; "
            f"got {ids[position]} at position {position}."
        )


def check_lengths(
    lengths: Lengths,
    tokens: tuple[int, int],
    *,
    name: str = "lengths",
) -> None:
    """Checks that `lengths` has one integer for each row, none of them longer than the rows.

    Args:
        lengths: the number of tokens of each row that count.
        tokens: the number of rows and the number of tokens in a row.
        name: the argument's name, for the message.

    Raises:
        TypeError: the lengths are not integers.
        ValueError: there is not one length for each row, or one is out of range.
    """
    rows, tokens_per_row = tokens
    argument = f"`{name}`"
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{argument} must be integers; got {lengths.dtype}.")
    if tuple(lengths.shape) != (rows,):
        raise ValueError(
            f"{argument} must have one number for each of {rows} rows; "
            f"got shape {tuple(lengths.shape)}."
        )
    if isinstance(lengths, Tracer):
        return
    values = np.asarray(lengths)
    wrong = np.flatnonzero((values < 0) | (values > tokens_per_row))
    if len(wrong):
        row = wrong[0]
        raise ValueError(
            f"{argument} must lie between 0 and {tokens_per_row}; got {values[row]} in row {row}."
        )


def check_prompts(
    prompts: Any,
    vocab_size: int,
    *,
    name: str = "prompts",
) -> list[list[int]]:
    """Returns prompts as lists of ids.

    Args:
        prompts: a list of prompts; each one is a list of ids that is not empty.
        vocab_size: the number of ids that the model has.
        name: the argument's name, for the message.

    Raises:
        ValueError: there is no prompt, one is empty, or an id is outside the vocabulary.
        TypeError: the ids are not integers, or there is one flat list.
    """
    argument = f"`{name}`"
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


def typed_key(key: Any) -> Array:
    """Returns a random key, or an array of keys, as a typed key array.

    Raises:
        TypeError: the key is not an array.
    """
    if not isinstance(key, jax.Array):
        kind = type(key).__name__
        raise TypeError(f"`key` must be a random key; got {kind}.")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)
