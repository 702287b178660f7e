"""Arithmetic of start states: weighted sums, scaling, capacity and singular values."""

import dataclasses
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from rwkv7_jax.checks import (
    as_array,
    check_instance,
    check_number,
    is_known,
    is_traced,
    prefix_errors,
)
from rwkv7_jax.model.state import RWKV7State, check_whole_state, map_linear_leaves
from rwkv7_jax.model.upscaled_memory import Upscaled

# Trained numbers for each fact of 5 bits that tuning of 300 to 1000 steps stored in toy models:
# 64 facts in 2,048 numbers, 129 in 4,096, 394 in 8,192, 628 in 16,384, 876 in 32,768. Bounds around
# these measurements, which depend on steps and optimiser; not a law.
NUMBERS_PER_FACT = (20, 35)


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Estimate of how much a start state can hold.

    Attributes:
        wkv: numbers of its WKV states.
        memory: numbers of its upscaled memory; 0 if there is none.
        trained: numbers of the parts that are not zero; of a new state, of the part that is usually
            tuned, the upscaled memory if there is one.
        facts: the fewest and the most facts of 5 bits to expect in them, by `NUMBERS_PER_FACT`:
            measured on toy tasks, after 300 to 1000 steps of tuning.
    """

    wkv: int
    memory: int
    trained: int
    facts: tuple[int, int]


def capacity(state: RWKV7State) -> Capacity:
    """Counts the numbers that were, or can be, trained in a state, and estimates the facts in them.

    Shift states are not counted: they are few, and were not measured.

    Args:
        state: batch 1.

    Raises:
        ValueError: more than one sequence.
    """
    with prefix_errors("capacity"):
        _check_single(state, "state")
    wkv = state.wkv.size
    trained = wkv if np.any(state.wkv) else 0
    memory = 0
    if state.upscaled is not None:
        memory = state.upscaled.memory.size
        if np.any(state.upscaled.memory):
            trained += memory
    trained = trained or memory or wkv
    # Fewest facts with the most numbers for each, and the reverse.
    least, most = NUMBERS_PER_FACT
    return Capacity(
        wkv=wkv,
        memory=memory,
        trained=trained,
        facts=(trained // most, trained // least),
    )


def weighted_sum(
    states: Sequence[RWKV7State], weights: Sequence[ArrayLike]
) -> RWKV7State:
    """Computes the weighted sum of start states of one model.

    [0.5, 0.5] averages, [1 - t, t] interpolates, [1, -1] subtracts the second state. What a state
    adds to a layer's read-out is linear in the state; the layers that follow are not, so a mixture
    of two states may lose abilities of both.

    Args:
        states: batch 1; upscaled ones only together, with the same features and dynamics. Traced
            features cannot be compared: those of the first state are taken.
        weights: one for each state.

    Raises:
        TypeError: an element that is not an `RWKV7State`.
        ValueError: no states, another number of weights, a weight that is not finite, or states
            that do not fit each other.
    """
    with prefix_errors("weighted_sum"):
        for name, value in (("states", states), ("weights", weights)):
            if isinstance(value, str | RWKV7State) or not isinstance(value, Iterable):
                raise TypeError(f"`{name}` must be a list; got {type(value).__name__}.")
        states = list(states)
        weights = list(weights)
        for weight in weights:
            check_number(weight, -math.inf, math.inf, "`weights`")
        # A traced one may be learnt.
        weights = [
            weight if is_traced(weight) else float(np.asarray(weight))
            for weight in weights
        ]
        _check_weights(weights, len(states))
        for index, state in enumerate(states):
            _check_single(state, f"states[{index}]")
            _check_alike(states[0], state, f"states[{index}]")
            _check_factor(weights[index], state, "`weights`")

    # Weights take the leaf's dtype: one state with weight 1 comes out as it is, bit for bit.
    def weighted(*leaves):
        first, *others = leaves
        total = first * jnp.asarray(weights[0], first.dtype)
        for leaf, weight in zip(others, weights[1:], strict=True):
            total = total + leaf * jnp.asarray(weight, leaf.dtype)
        return total.astype(first.dtype)

    return map_linear_leaves(weighted, *states)


def _check_weights(weights: list, count: int) -> None:
    if not count or count != len(weights):
        raise ValueError(
            "`weights` must be one for each state, at least one; "
            f"got {len(weights)} weights and {count} states."
        )


def _check_single(state: RWKV7State, name: str) -> None:
    check_instance(state, RWKV7State, f"`{name}`")
    if state.batch != 1:
        raise ValueError(f"`{name}` must hold one sequence; got {state.batch}.")


def _check_alike(first: RWKV7State, other: RWKV7State, name: str) -> None:
    """Raises unless both states belong to one model and are read in the same way."""
    for leaf in ("att_shift", "wkv", "ffn_shift"):
        expected = tuple(getattr(first, leaf).shape)
        shape = tuple(getattr(other, leaf).shape)
        if shape != expected:
            raise ValueError(
                f"`{name}.{leaf}` must have the shape of states[0]'s, {expected}; got {shape}."
            )
    if first.upscaled is not None and other.upscaled is not None:
        _check_same_reading(first.upscaled, other.upscaled, f"{name}.upscaled")
    elif first.upscaled is not None or other.upscaled is not None:
        count = {True: "none", False: "one"}
        raise ValueError(
            f"`{name}` must have an upscaled memory if and only if states[0] has; "
            f"got {count[other.upscaled is None]} and {count[first.upscaled is None]}."
        )


def _check_same_reading(first: Upscaled, other: Upscaled, name: str) -> None:
    """Raises unless two memories are read through the same features and have the same dynamics."""
    properties = (
        ("dynamics", first.dynamics, other.dynamics),
        ("features.kind", first.features.kind, other.features.kind),
        ("memory", tuple(first.memory.shape), tuple(other.memory.shape)),
    )
    for field, expected, value in properties:
        if value != expected:
            raise ValueError(
                f"`{name}.{field}` must be states[0]'s, {expected}; got {value}."
            )
    frozen = (
        "features.landmarks",
        "features.widths",
        "features.mean",
        "features.map",
        "readout",
    )
    for field in frozen:
        read = operator.attrgetter(field)
        if not _equal(read(first), read(other)):
            raise ValueError(f"`{name}.{field}` must equal states[0]'s; it differs.")


def _check_factor(factor: ArrayLike, state: RWKV7State, argument: str) -> None:
    """Raises unless a factor is finite in every dtype of a state's leaves."""
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state)}
    largest = min(float(jnp.finfo(dtype).max) for dtype in dtypes)
    bounds = f"finite and at most {largest:.4g} in size"
    check_number(factor, -largest, largest, argument, bounds=bounds)


def _equal(first: jax.Array | None, second: jax.Array | None) -> bool:
    """Tells whether two arrays are equal; in a program, where they are not known, they may be."""
    if first is None or second is None:
        return first is second
    if not (is_known(first) and is_known(second)):
        return True
    return np.array_equal(np.asarray(first), np.asarray(second))


def scaled(state: RWKV7State, alpha: ArrayLike) -> RWKV7State:
    """Multiplies a state by `alpha`: 0 gives the base model's zeros, 1 the tuned state.

    Raises:
        TypeError: not an `RWKV7State`, or a factor that is no number.
        ValueError: a factor that is not finite.
    """
    with prefix_errors("scaled"):
        check_whole_state(state, "`state`")
        if np.ndim(alpha):
            raise ValueError(
                f"`alpha` must be one number; got shape {np.shape(alpha)}."
            )
        _check_factor(alpha, state, "`alpha`")
    return map_linear_leaves(lambda leaf: leaf * jnp.asarray(alpha, leaf.dtype), state)


def check_memory(memory: Any) -> Any:
    """Returns the matrices of one sequence as an array.

    Raises:
        TypeError: not an array of numbers.
        ValueError: another shape than [L 1 H Nv M].
    """
    memory = as_array(memory, "`memory`")
    shape = tuple(memory.shape)
    if len(shape) != 5 or shape[1] != 1:
        raise ValueError(f"`memory` must have shape [L 1 H Nv M]; got {shape}.")
    return memory


def singular_values(
    memory: Float[Array | np.ndarray, "L 1 H Nv M"],
) -> Float[np.ndarray, "L H R"]:
    """Computes the singular values of every layer's and head's matrix, largest first, in float64.

    Args:
        memory: `state.wkv` or `state.upscaled.memory` of a state of batch 1.

    Raises:
        TypeError: not an array of numbers.
        ValueError: not the matrices of one sequence.
    """
    with prefix_errors("singular_values"):
        memory = check_memory(memory)
    return np.linalg.svd(np.asarray(memory[:, 0], np.float64), compute_uv=False)
