"""Start states as adapters: mixed, and how much they can hold."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rwkv7_jax.model.state import RWKV7State, Upscaled, map_linear_leaves

# Trained numbers for each fact of 5 bits that tuning of 300 to 1000 steps stored in toy models:
# 64 facts in 2,048 numbers, 129 in 4,096, 394 in 8,192, 628 in 16,384, 876 in 32,768. Bounds around
# what was seen, which depends on steps and optimiser, and no law.
NUMBERS_PER_FACT = (20, 35)


@dataclasses.dataclass(frozen=True)
class Capacity:
    """How much a start state can hold.

    Attributes:
        wkv: numbers of its WKV states.
        memory: numbers of its upscaled memory; 0 where there is none.
        trained: those of the parts that hold anything; of a new state, of the part that is usually
            tuned, the upscaled memory where there is one.
        facts: the fewest and the most facts of 5 bits to expect in them, by `NUMBERS_PER_FACT`:
            measured on toy tasks, after 300 to 1000 steps of tuning.
    """

    wkv: int
    memory: int
    trained: int
    facts: tuple[int, int]


def capacity(state: RWKV7State) -> Capacity:
    """The numbers that were, or can be, trained in a state of batch 1, and what they may hold.

    Shift states are not counted: they are few, and were not measured.

    Raises:
        ValueError: more than one sequence.
    """
    _check_single(state, "state", "capacity")
    wkv = state.wkv.size
    memory = 0 if state.upscaled is None else state.upscaled.memory.size
    trained = wkv if np.any(state.wkv) else 0
    if memory and np.any(state.upscaled.memory):
        trained += memory
    trained = trained or memory or wkv
    most, fewest = (trained // each for each in NUMBERS_PER_FACT)
    return Capacity(wkv=wkv, memory=memory, trained=trained, facts=(fewest, most))


def weighted_sum(states: Sequence[RWKV7State], weights: Sequence[float]) -> RWKV7State:
    """The weighted sum of start states of one model.

    [0.5, 0.5] averages, [1 - t, t] interpolates, [1, -1] takes what the other knows away. What a
    state adds to a layer's read-out is linear in it; what is made of that is not, so a mixture of
    two states may lose some of what either could do.

    Args:
        states: batch 1; upscaled ones only together, with the same features and dynamics.
        weights: one a state.

    Raises:
        TypeError: something that is no `RWKV7State`.
        ValueError: no states, another number of weights, a weight that is not finite, or states
            that do not fit each other.
    """
    states, weights = list(states), [float(weight) for weight in weights]
    if not states or len(states) != len(weights):
        raise ValueError(
            "weighted_sum: `weights` must be one a state, at least one; "
            f"got {len(weights)} weights and {len(states)} states."
        )
    for weight in weights:
        if not np.isfinite(weight):
            raise ValueError(f"weighted_sum: `weights` must be finite; got {weight}.")
    for index, state in enumerate(states):
        _check_single(state, f"states[{index}]", "mix")
        _check_alike(states[0], state, f"states[{index}]")

    def weighted(*leaves):
        terms = [x * jnp.asarray(w, x.dtype) for x, w in zip(leaves, weights, strict=True)]
        return sum(terms[1:], terms[0]).astype(leaves[0].dtype)

    return map_linear_leaves(weighted, *states)


def _check_single(state: RWKV7State, name: str, caller: str) -> None:
    if not isinstance(state, RWKV7State):
        raise TypeError(f"{caller}: `{name}` must be an RWKV7State; got {type(state).__name__}.")
    if state.batch != 1:
        raise ValueError(f"{caller}: `{name}` must hold one sequence; got {state.batch}.")


def _check_alike(first: RWKV7State, other: RWKV7State, name: str) -> None:
    """Return if the two are states of one model, read in the same way."""
    for leaf in ("att_shift", "wkv", "ffn_shift"):
        wanted, came = (tuple(getattr(state, leaf).shape) for state in (first, other))
        if came != wanted:
            raise ValueError(
                f"weighted_sum: `{name}.{leaf}` must have the shape of states[0]'s, "
                f"{wanted}; got {came}."
            )
    without = [state.upscaled is None for state in (first, other)]
    if without[0] != without[1]:
        held = {True: "none", False: "one"}
        raise ValueError(
            f"weighted_sum: `{name}` must have an upscaled memory if and only if states[0] has; "
            f"got {held[without[1]]} and {held[without[0]]}."
        )
    if not without[0]:
        _check_same_reading(first.upscaled, other.upscaled, f"{name}.upscaled")


def _check_same_reading(first: Upscaled, other: Upscaled, name: str) -> None:
    """Return if two memories are read through the same features and change in the same way."""
    for what, wanted, came in (
        ("dynamics", first.dynamics, other.dynamics),
        ("features.kind", first.features.kind, other.features.kind),
        ("memory", tuple(first.memory.shape), tuple(other.memory.shape)),
    ):
        if came != wanted:
            raise ValueError(
                f"weighted_sum: `{name}.{what}` must be states[0]'s, {wanted}; got {came}."
            )
    fixed = [f"features.{leaf}" for leaf in ("landmarks", "widths", "mean", "map")]
    for what in [*fixed, "readout"]:
        one, two = (functools.reduce(getattr, what.split("."), memory) for memory in (first, other))
        if not _equal(one, two):
            raise ValueError(f"weighted_sum: `{name}.{what}` must equal states[0]'s; it differs.")


def _equal(one: jax.Array | None, two: jax.Array | None) -> bool:
    if one is None or two is None:
        return one is two
    return np.array_equal(np.asarray(one), np.asarray(two))


def scaled(state: RWKV7State, alpha: float) -> RWKV7State:
    """`alpha` times the state: between the base model at 0 and the tuned one at 1."""
    return map_linear_leaves(lambda leaf: leaf * jnp.asarray(alpha, leaf.dtype), state)


def singular_values(state: RWKV7State) -> Float[np.ndarray, "L H N"]:
    """The singular values of every layer's and head's WKV state, largest first; batch 1."""
    return np.linalg.svd(np.asarray(state.wkv[:, 0]), compute_uv=False)
