"""Checks of models and their weights."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from rwkv7_jax.checks.arrays import check_placed


def check_model(model: Any, argument: str = "`model`") -> None:
    """Checks that a value is a model, not a config or weights.

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


def is_intercepted() -> bool:
    """Tells whether Flax calls somebody's function in place of a module's methods."""
    # Flax has no public name for them. A test tells if this one is gone.
    return bool(getattr(nn.module, "_global_interceptor_stack", ()))


def check_not_intercepted() -> None:
    """Checks that a program which is kept for later calls may be compiled.

    Raises:
        ValueError: Flax's interceptors would become part of it, or a kept one would ignore them.
    """
    if is_intercepted():
        raise ValueError(
            "it must be called outside of flax.linen.intercept_methods, because its program is "
            "kept for later calls; inside, call `model.apply`, also in a loss."
        )


def check_params(params: Any, config: Any, argument: str = "`params`") -> None:
    """Checks that weights have the sizes of a model, by a few characteristic shapes.

    Args:
        params: the inner tree of weights: arrays, tracers or shapes.
        config: the model's configuration.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the weights are not a mapping.
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
        leaf = _leaf_at(params, path)
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


def check_runnable(
    model: Any,
    params: Any,
    model_argument: str = "`model`",
    params_argument: str = "`params`",
) -> None:
    """Checks that a public function may run a model on its weights.

    Args:
        model: the model.
        params: the inner tree of weights.
        model_argument: the model's argument in backticks; a message begins with it.
        params_argument: the same for the weights.

    Raises:
        TypeError: not a model, or the weights are not a mapping.
        ValueError: the weights belong to another model or are not placed on the mesh, or the call
            is inside `flax.linen.intercept_methods`.
    """
    check_not_intercepted()
    check_model(model, model_argument)
    check_params(params, model.config, params_argument)
    check_placed(params, params_argument)


def _leaf_at(params: Any, path: str) -> Any:
    """Returns the leaf of nested dicts at a path such as "layer_0/att/r_k"; None without one."""
    leaf = params
    for name in path.split("/"):
        leaf = leaf.get(name) if isinstance(leaf, Mapping) else None
    return leaf
