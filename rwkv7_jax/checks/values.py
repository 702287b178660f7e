"""Checks of numbers, choices and objects."""

import math
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rwkv7_jax.checks.arrays import is_traced


def check_function(value: Any, argument: str) -> None:
    """Checks that a value can be called.

    Raises:
        TypeError: the value cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{argument} must be a function; got {type(value).__name__}.")


def check_instance(value: Any, kind: type, argument: str) -> None:
    """Checks that a value is an instance of a class.

    Raises:
        TypeError: the value is something else.
    """
    if isinstance(value, kind):
        return
    article = "an" if kind.__name__[0] in "AEIOR" else "a"
    came = type(value).__name__
    if came == kind.__name__:
        came = "one from a module that was reloaded since; restart Python"
    raise TypeError(f"{argument} must be {article} {kind.__name__}; got {came}.")


def is_real_number(value: Any) -> bool:
    """Tells whether a value is a real number, not text, an array or a complex number."""
    return isinstance(value, int | float | np.integer | np.floating | np.bool_)


def as_float(number: Any) -> float:
    """Converts a number to a float; an integer that is too large becomes an infinity.

    Raises:
        TypeError: not a number.
        ValueError: text that is not a number.
    """
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def check_number(
    value: Any,
    low: float | int,
    high: float | int,
    argument: str,
    *,
    above: bool = False,
    bounds: str = "",
) -> None:
    """Checks that a value is a finite number in a closed interval; traced values pass.

    Args:
        value: the value to check.
        low: the smallest allowed number; minus infinity for no limit.
        high: the largest allowed number; infinity for no limit.
        argument: the argument in backticks; the message begins with it.
        above: whether `low` itself is excluded.
        bounds: replaces the message's description of the interval.

    Raises:
        TypeError: the value is not a number.
        ValueError: the number is outside the interval, or not finite.
    """
    if is_traced(value):
        return
    # `float` would parse a string.
    is_text = isinstance(value, str | bytes | bytearray)
    try:
        number = as_float("text" if is_text else value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{argument} must be a number; got {type(value).__name__}."
        ) from None
    inside = low < number if above else low <= number
    if math.isfinite(number) and inside and number <= high:
        return
    bounds = bounds or _describe_interval(low, high, above)
    if math.isinf(number) and math.isinf(high) and bounds != "finite":
        bounds = f"{bounds} and finite"
    raise ValueError(f"{argument} must be {bounds}; got {number:g}.")


def _describe_interval(low: float | int, high: float | int, above: bool) -> str:
    """Describes the allowed numbers in words."""
    lowest = f"above {low:g}" if above else f"at least {low:g}"
    if not math.isinf(high):
        return (
            f"{lowest} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        )
    return "finite" if math.isinf(low) else lowest


def check_choice(value: Any, choices: Iterable[str], argument: str) -> None:
    """Checks that a value is one of some names.

    Args:
        value: the value to check.
        choices: the allowed names.
        argument: the argument in backticks; the message begins with it.

    Raises:
        ValueError: the value is not one of them.
    """
    names = list(choices)
    # The type is checked first, because comparing an array gives an array.
    if not isinstance(value, str) or value not in names:
        raise ValueError(
            f"{argument} must be one of {', '.join(names)}; got {value!r}."
        )


def check_count(
    value: Any, least: int, argument: str, *, most: int | None = None
) -> int:
    """Checks that a value is an integer of at least `least`, and returns it as an int.

    Args:
        value: the value to check.
        least: the smallest allowed integer.
        most: the largest allowed integer; None for no limit.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the value is not an integer.
        ValueError: the integer is too small or too large.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{argument} must be an integer; got {type(value).__name__}."
        ) from None
    if number < least:
        raise ValueError(f"{argument} must be at least {least}; got {number}.")
    if most is not None and number > most:
        raise ValueError(f"{argument} must be at most {most}; got {number}.")
    return number


def check_size(value: Any, argument: str) -> int:
    """Checks that a value is an integer of at least 1, and returns it as an int.

    Raises:
        ValueError: the value is not an integer, or below 1.
    """
    try:
        size = operator.index(value)
    except TypeError:
        size = 0
    # In Python, True is an integer.
    if size < 1 or isinstance(value, bool):
        raise ValueError(f"{argument} must be a positive integer; got {value!r}.")
    return size


def check_seed(seed: Any) -> int:
    """Checks a seed for NumPy and JAX, an integer from 0 to 2**32 - 1, and returns it as an int.

    Raises:
        TypeError: the value is not an integer.
        ValueError: the integer is out of range.
    """
    return check_count(seed, 0, "`seed`", most=2**32 - 1)


def typed_key(key: Any) -> Array:
    """Converts a random key, or an array of keys, to a typed key array.

    Raises:
        TypeError: the key is not an array.
    """
    if not isinstance(key, jax.Array):
        kind = type(key).__name__
        raise TypeError(f"`key` must be a random key; got {kind}.")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def check_key(key: Any) -> Array:
    """Checks that there is one random key, and converts it to a typed key.

    Raises:
        TypeError: the key is not an array.
        ValueError: an array of several keys.
    """
    key = typed_key(key)
    if key.ndim:
        raise ValueError(f"`key` must be one key; got shape {key.shape}.")
    return key
