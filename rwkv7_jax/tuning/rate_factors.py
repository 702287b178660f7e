"""Separate learning rates for the leaves and layers of a start state."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from rwkv7_jax.checks import check_instance, check_number, prefix_errors
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.optim.decorrelation import Decorrelator
from rwkv7_jax.optim.optimizer import scale_by_factors
from rwkv7_jax.tuning.state_tuning import LEAVES, replace_parts, tuned_parts


def rate_factors(
    state: RWKV7State,
    *,
    leaf_rates: Mapping[str, float] | None = None,
    layer_rates: Sequence[float] = (),
) -> RWKV7State:
    """Makes factors on the learning rate, for `optim.scale_by_factors`.

    Args:
        state: the start state that is tuned, or its shapes; leaves have a leading axis of layers.
        leaf_rates: factors by leaf name, of `state_tuning.LEAVES`; other leaves have 1.
        layer_rates: factors of the layers, from the first on; empty means 1 for all.

    Returns:
        A state whose leaves are factors [L 1 ...], the products of leaf and layer factors.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a leaf that the state does not have, a wrong number of layers, or a negative
            factor.
    """
    with prefix_errors("rate_factors"):
        check_instance(state, RWKV7State, "`state`")
        leaf_rates = {} if leaf_rates is None else leaf_rates
        if not isinstance(leaf_rates, Mapping):
            kind = type(leaf_rates).__name__
            raise TypeError(f"`leaf_rates` must be a dict of factors; got {kind}.")
        has = [
            name for name in LEAVES if name != "memory" or state.upscaled is not None
        ]
        for name, factor in leaf_rates.items():
            if name not in has:
                raise ValueError(
                    f"`leaf_rates` must be of {', '.join(has)}; got {name!r}."
                )
            check_number(factor, 0, math.inf, "`leaf_rates`")
        # A single number has no axis, and neither has text.
        if np.ndim(layer_rates) != 1:
            kind = type(layer_rates).__name__
            raise TypeError(f"`layer_rates` must be a list of factors; got {kind}.")
        layers = state.wkv.shape[0]
        if len(layer_rates) not in (0, layers):
            raise ValueError(
                f"`layer_rates` must have a number for each of {layers} layers; "
                f"got {len(layer_rates)}."
            )
        for factor in layer_rates:
            check_number(factor, 0, math.inf, "`layer_rates`")
    # `len`, because the truth value of an array is undefined.
    of_layers = np.asarray(layer_rates if len(layer_rates) else 1.0, np.float32)
    of_layers = np.broadcast_to(of_layers, layers)

    def spread(leaf: Any, factor: float = 1.0) -> np.ndarray:
        return factor * of_layers.reshape(-1, *[1] * (leaf.ndim - 1))

    parts = {}
    for name, factor in leaf_rates.items():
        for part, leaf in tuned_parts(state, (name,)).items():
            parts[part] = spread(leaf, factor)
    return replace_parts(jax.tree.map(spread, state), parts)


def with_rate_factors(decorrelator: Decorrelator, factors: RWKV7State) -> Decorrelator:
    """Adds factors on the learning rate to a decorrelated optimizer.

    They apply outside the change of coordinates, which commutes with factors per leaf or layer.
    """

    def wrap(tx):
        return optax.chain(decorrelator.wrap(tx), scale_by_factors(factors))

    return decorrelator._replace(wrap=wrap)
