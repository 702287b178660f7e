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
        ValueError: the weight has another shape, or is not an array.
    """
    if not module.has_variable("params", name):
        return module.param(name, draw, shape, *arguments)
    value = module.get_variable("params", name)
    path = "/".join((*module.path, name))
    own = own_shape(path, shape)
    came = getattr(value, "shape", type(value).__name__)
    if came != own:
        raise ValueError(
            f"`params` must be those of this model, with {path} of shape {own}; got {came}."
        )
    return value
