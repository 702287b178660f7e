"""The weights of Flax modules."""

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

    `module.param` alone would trace `draw` in every call, only to compare shapes. That is half of
    the time that tracing a model takes.

    Args:
        module: the module, inside a compact method.
        name: of the weight.
        draw: computes the initial values: `draw(key, shape, *arguments)`.
        shape: of the whole weight. With tensor parallelism a device has a part of it.
        *arguments: of `draw`.

    Raises:
        ValueError: the weight has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, draw, shape, *arguments)
    value = module.get_variable("params", name)
    path = "/".join((*module.path, name))
    own = own_shape(path, shape)
    if tuple(value.shape) != own:
        raise ValueError(
            f"`params` must be those of this model, with {path} of shape {own}; "
            f"got {tuple(value.shape)}."
        )
    return value
