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
from rwkv7_jax.model.upscaled_memory import Upscaled, check_memory_types

# Trained numbers per fact of 5 bits in toy models after 300 to 1000 steps of tuning: 64 facts in
# 2,048 numbers, 129 in 4,096, 394 in 8,192, 628 in 16,384, 876 in 32,768. These are bounds around
# measurements that depend on steps and optimizer, not a law.
NUMBERS_PER_FACT = (20, 35)


@dataclasses.dataclass(frozen=True)
class Capacity:
    """An estimate of how much a start state can hold.

    Attributes:
        wkv: numbers in its WKV states.
        memory: numbers in its upscaled memory; 0 if there is none.
        trained: numbers in the parts that are not zero; for a new state, in the part that is tuned
            by default: the upscaled memory if there is one, else the WKV states.
        facts: the expected range of facts of 5 bits in them, by `NUMBERS_PER_FACT`: measured on toy
            tasks, after 300 to 1000 steps of tuning.
    """

    wkv: int
    memory: int
    trained: int
    facts: tuple[int, int]


def capacity(state: RWKV7State) -> Capacity:
    """Counts the trained or trainable numbers of a state, and estimates the facts in them.

    Shift states are not counted: they are few and were not measured.

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
    # The most numbers per fact give the fewest facts.
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

    [0.5, 0.5] averages, [1 - t, t] interpolates, [1, -1] subtracts the second state. A layer's
    read-out is linear in the state, but the following layers are not, so a mixture of two states
    may lose abilities of both.

    Args:
        states: batch 1. All or none are upscaled, with the same features and dynamics. Traced
            features are not compared; the result has those of the first state.
        weights: one for each state.

    Raises:
        TypeError: an element that is not an `RWKV7State`.
        ValueError: no states, a different number of weights, a non-finite weight, or states that
            do not match each other.
    """
    with prefix_errors("weighted_sum"):
        for name, value in (("states", states), ("weights", weights)):
            if isinstance(value, str | RWKV7State) or not isinstance(value, Iterable):
                raise TypeError(f"`{name}` must be a list; got {type(value).__name__}.")
        states = list(states)
        weights = list(weights)
        for weight in weights:
            check_number(weight, -math.inf, math.inf, "`weights`")
        # A traced weight may be trained.
        weights = [
            weight if is_traced(weight) else float(np.asarray(weight))
            for weight in weights
        ]
        if not states or len(states) != len(weights):
            raise ValueError(
                "`weights` must hold one number for each state, at least one; "
                f"got {len(weights)} weights and {len(states)} states."
            )
        for index, state in enumerate(states):
            _check_single(state, f"states[{index}]")
            _check_alike(states[0], state, f"states[{index}]")
            _check_factor(weights[index], state, "`weights`")

    # Weights take the leaf's dtype, so a single state with weight 1 stays bit-exact.
    def weighted(*leaves):
        first, *others = leaves
        total = first * jnp.asarray(weights[0], first.dtype)
        for leaf, weight in zip(others, weights[1:], strict=True):
            total = total + leaf * jnp.asarray(weight, leaf.dtype)
        return total.astype(first.dtype)

    return map_linear_leaves(weighted, *states)


def _check_single(state: RWKV7State, name: str) -> None:
    check_instance(state, RWKV7State, f"`{name}`")
    check_memory_types(state.upscaled, f"`{name}.upscaled`")
    if state.batch != 1:
        raise ValueError(f"`{name}` must hold one sequence; got {state.batch}.")


def _check_alike(first: RWKV7State, other: RWKV7State, name: str) -> None:
    """Raises unless both states belong to the same model and are read in the same way."""
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
    """Raises unless two memories have the same features and dynamics."""
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
    """Tells whether two arrays are equal; arrays that are not concrete count as equal."""
    if first is None or second is None:
        return first is second
    if not (is_known(first) and is_known(second)):
        return True
    return np.array_equal(np.asarray(first), np.asarray(second))


def scaled(state: RWKV7State, alpha: ArrayLike) -> RWKV7State:
    """Multiplies a state by `alpha`: 0 gives the base model's zeros, 1 the tuned state.

    Raises:
        TypeError: not an `RWKV7State`, or a factor that is not a number.
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
    """Checks the matrices of one sequence and returns them as an array.

    Raises:
        TypeError: not an array of numbers.
        ValueError: another shape than [L 1 H Nv M], or a number is NaN or infinite.
    """
    memory = as_array(memory, "`memory`")
    shape = tuple(memory.shape)
    if len(shape) != 5 or shape[1] != 1:
        raise ValueError(f"`memory` must have shape [L 1 H Nv M]; got {shape}.")
    # The singular value decomposition would fail, or give NaN for all heads.
    if not np.all(np.isfinite(np.asarray(memory, np.float64))):
        raise ValueError("`memory` must be finite; it holds NaN or infinity.")
    return memory


def singular_values(
    memory: Float[Array | np.ndarray, "L 1 H Nv M"],
) -> Float[np.ndarray, "L H R"]:
    """Computes the singular values of every layer's and head's matrix, largest first, in float64.

    Args:
        memory: `state.wkv` or `state.upscaled.memory` of a state of batch 1.

    Raises:
        TypeError: not an array of numbers.
        ValueError: not the matrices of one sequence, or not finite.
    """
    with prefix_errors("singular_values"):
        memory = check_memory(memory)
    return np.linalg.svd(np.asarray(memory[:, 0], np.float64), compute_uv=False)
