"""How Flax modules get their weights."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jaxtyping import Array

from rwkv7_jax.sharding import own_shape

# Takes a random key, the shape, and whatever else `get_weight` is given.
Draw = Callable[..., Array]


def get_weight(
    module: nn.Module, name: str, draw: Draw, shape: tuple[int, ...], *arguments: Any
) -> Any:
    """Returns a module's weight, which is drawn when the module is initialised.

    `module.param` alone would also trace `draw` in every call, only to compare shapes.

    Args:
        module: the module, inside a compact method.
        name: the name of the weight.
        draw: computes the initial values: `draw(key, shape, *arguments)`.
        shape: the shape of the complete weight. With tensor parallelism a device has only some of
            its heads or channels.
        *arguments: further arguments of `draw`.

    Raises:
        ValueError: the weight is missing, has another shape, or is not an array.
    """
    value = module.get_variable("params", name)
    if value is None and module.is_mutable_collection("params"):
        return module.param(name, draw, shape, *arguments)
    path = "/".join((*module.path, name))
    own = own_shape(path, shape)
    came = "none" if value is None else type(value).__name__
    came = getattr(value, "shape", came)
    if came != own:
        raise ValueError(
            f"`params` must be those of this model, with {path} of shape {own}; got {came}."
        )
    return value
