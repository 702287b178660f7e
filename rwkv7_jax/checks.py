"""Argument checks shared by the public functions.

A check knows the argument and not the function that the user called: its message begins with the
argument in backticks. The public function adds its own name, once, with `prefix_errors`.
"""

import contextlib
import contextvars
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    Raises:
        TypeError: the value cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{argument} must be a function; got {type(value).__name__}.")


def is_traced(value: Any) -> bool:
    """Tells whether a value is only known inside a compiled program, so that it cannot be read."""
    return isinstance(value, Tracer)


def is_known(value: Any) -> bool:
    """Tells whether an array's numbers can be read here: not traced, and all of it on this host."""
    if is_traced(value) or isinstance(value, jax.ShapeDtypeStruct):
        return False
    return getattr(value, "is_fully_addressable", True)


def check_instance(value: Any, kind: type, argument: str) -> None:
    """Checks that a value is an instance of a class.

    Raises:
        TypeError: the value is something else.
    """
    if isinstance(value, kind):
        return
    article = "an" if kind.__name__[0] in "AEIOR" else "a"
    raise TypeError(
        f"{argument} must be {article} {kind.__name__}; got {type(value).__name__}."
    )


def check_model(model: Any, argument: str = "`model`") -> None:
    """Checks that a value is a model: a module with the sizes of an RWKV-7 in `config`.

    Raises:
        TypeError: the value is something else, such as a config or the weights.
    """
    sizes = getattr(model, "config", None)
    if (
        isinstance(model, type)
        or not hasattr(sizes, "vocab_size")
        or not hasattr(model, "apply")
    ):
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{argument} must be a model, RWKV7(config); got {kind}.")


def check_params(params: Any, config: Any, argument: str = "`params`") -> None:
    """Checks that weights have the sizes of a model, by the few shapes that tell models apart.

    Args:
        params: the inner tree of weights: arrays, tracers or shapes.
        config: the model's configuration.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the weights are no mapping.
        ValueError: a part is missing, or belongs to a model of other sizes.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"{argument} must be the tree of weights, a dict; got {type(params).__name__}."
        )
    table = (config.vocab_size, config.width)
    shapes: dict[str, tuple[int, ...]] = {
        "emb/weight": table,
        "head/weight": table,
        "layer_0/att/r_k": (config.num_heads, config.head_size),
        "layer_0/ffn/key/weight": (config.ffn_width, config.width),
    }
    if config.num_layers > 1:
        others = config.num_layers - 1
        shapes["layers/att/r_k"] = (others, config.num_heads, config.head_size)
    elif "layers" in params:
        raise ValueError(
            f"{argument} must be those of a model of 1 layer; got more layers."
        )
    for path, wanted in shapes.items():
        leaf: Any = params
        for name in path.split("/"):
            leaf = leaf.get(name) if isinstance(leaf, Mapping) else None
        if leaf is None:
            hint = " (pass the inner tree)" if "params" in params else ""
            names = ", ".join(map(str, params)) or "nothing"
            raise ValueError(f"{argument} must hold {path}{hint}; it has {names}.")
        came = tuple(np.shape(leaf))
        if came != wanted:
            raise ValueError(
                f"{argument} must be those of this model, with {path} of shape {wanted}; "
                f"got {came}."
            )


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
        above: whether `low` itself is refused.
        bounds: what must hold, for the message, where its usual words do not fit.

    Raises:
        TypeError: the value is not a number.
        ValueError: the number is outside the interval, or not finite.
    """
    if is_traced(value):
        return
    # `float` would read a number out of a string.
    is_text = isinstance(value, str | bytes | bytearray)
    try:
        number = float("text" if is_text else value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{argument} must be a number; got {type(value).__name__}."
        ) from None
    except OverflowError:
        number = math.inf
    inside = low < number if above else low <= number
    if math.isfinite(number) and inside and number <= high:
        return
    bounds = bounds or _describe_interval(low, high, above)
    if math.isinf(number) and math.isinf(high) and bounds != "finite":
        bounds = f"{bounds} and finite"
    raise ValueError(f"{argument} must be {bounds}; got {number:g}.")


def _describe_interval(low: float | int, high: float | int, above: bool) -> str:
    """Says in words which numbers are allowed."""
    lowest = f"above {low:g}" if above else f"at least {low:g}"
    if not math.isinf(high):
        return (
            f"{lowest} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        )
    return "finite" if math.isinf(low) else lowest


def as_array(value: Any, argument: str) -> Any:
    """Returns an array as it is, and a list of numbers as a NumPy array.

    Args:
        value: an array, a tracer, or lists of numbers of one length.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the value is no array of numbers.
        ValueError: lists of different lengths.
    """
    if isinstance(value, jax.Array | np.ndarray):
        return value
    # Shapes without numbers, as in `jax.eval_shape`.
    # Tensors of PyTorch have dtypes of another kind.
    if hasattr(value, "shape") and isinstance(getattr(value, "dtype", None), np.dtype):
        return value
    if not isinstance(value, list | tuple | range):
        raise TypeError(f"{argument} must be an array; got {type(value).__name__}.")
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(
            f"{argument} must be rows of one length; got a ragged list."
        ) from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{argument} must hold numbers; got a list of {array.dtype}.")
    # NumPy's float64 and int64 are not what JAX would make of such a list.
    if array.dtype == np.float64:
        return array.astype(np.float32)
    return array


def check_indices(indices: Any, count: int, argument: str) -> None:
    """Checks that integer indices lie inside an axis, counted from its end where negative.

    Args:
        indices: an integer or an array of them; those that are traced are not known, and pass.
        count: the length of the axis.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the indices are not integers.
        ValueError: an index is outside the axis.
    """
    dtype = np.result_type(indices) if np.ndim(indices) == 0 else indices.dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{argument} must be integers; got {dtype}.")
    if not is_known(indices):
        return
    values = np.asarray(indices)
    wrong = (values < -count) | (values >= count)
    if wrong.any():
        raise ValueError(
            f"{argument} must lie between {-count} and {count - 1}, because there are {count}; "
            f"got {values[wrong][0]}."
        )


def check_choice(value: Any, choices: Iterable[str], argument: str) -> None:
    """Checks that a value is one of some names.

    Args:
        value: the value to check.
        choices: the allowed names.
        argument: the argument in backticks; the message begins with it.

    Raises:
        ValueError: the value is none of them.
    """
    names = list(choices)
    # Not `value in names`: comparing an array gives an array.
    if not isinstance(value, str) or value not in names:
        raise ValueError(
            f"{argument} must be one of {', '.join(names)}; got {value!r}."
        )


def check_count(
    value: Any, least: int, argument: str, *, most: int | None = None
) -> int:
    """Returns a value as an integer of at least `least`.

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


def check_seed(value: Any, argument: str = "`seed`") -> int:
    """Returns a seed that both NumPy and JAX take: an integer from 0 to 2**32 - 1.

    Raises:
        TypeError: the value is not an integer.
        ValueError: the integer is out of range.
    """
    return check_count(value, 0, argument, most=2**32 - 1)


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
    if (
        isinstance(ids, str | bytes)
        or not hasattr(ids, "__len__")
        or isinstance(ids, Mapping)
    ):
        raise TypeError(f"{argument} must be a list of ids; got {type(ids).__name__}.")
    if np.ndim(ids) == 0 and hasattr(ids, "dtype"):
        raise ValueError(f"{argument} must be a flat list of ids; got shape ().")
    # A set has a length, and NumPy would make one object of it.
    ids = sorted(ids) if isinstance(ids, set | frozenset) else ids
    # NumPy makes an empty list float64, so the empty case needs its dtype by hand.
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
    tokens: Int[Array | np.ndarray, "..."],
    vocab_size: int,
    argument: str = "`tokens`",
) -> None:
    """Checks that token ids are integers inside the vocabulary.

    The values of traced ids are unknown: of these only the dtype is checked.

    Args:
        tokens: the ids.
        vocab_size: the number of ids that the model has.
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


def check_key(key: Any) -> Array:
    """Returns one random key as a typed key.

    Raises:
        TypeError: the key is not an array.
        ValueError: several keys.
    """
    key = typed_key(key)
    if key.ndim:
        raise ValueError(f"`key` must be one key; got shape {key.shape}.")
    return key
