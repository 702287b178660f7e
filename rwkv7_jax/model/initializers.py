"""Initial values of all parameters of a new model.

An initializer takes a random key, the shape, the block's index (traced where blocks are initialised
inside a scan) and the config, and returns a float32 array.

Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/model.py:510-581, 713-723, 892-975, where the
second stage overrides the constructors; checked there against flash-linear-attention 0.6.0.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rwkv7_jax.model.config import RWKV7Config

Shape = tuple[int, ...]
Initial = Callable[[Array, Shape, int | Array, RWKV7Config], Array]


def _in_float32(initial: Initial) -> Initial:
    """Makes an initializer compute in float32, independently of JAX's dtype settings.

    A traced layer is an integer. JAX would promote it to float64 under x64, and would raise under
    strict promotion.
    """

    @functools.wraps(initial)
    def cast(key, shape, layer, config):
        if isinstance(layer, jax.Array):
            layer = layer.astype(jnp.float32)
        return initial(key, shape, layer, config).astype(jnp.float32)

    return cast


def _ramp(config: RWKV7Config) -> Array:
    """Computes n / (D - 1) for each channel n."""
    return jnp.linspace(0.0, 1.0, config.width, dtype=jnp.float32)


def _channels(config: RWKV7Config) -> Array:
    """Returns the indices of the channels, 0 to D - 1."""
    return jnp.arange(config.width, dtype=jnp.float32)


def _zigzag(config: RWKV7Config) -> Array:
    """Computes a signed quadratic ramp from -1 to 1 inside each head."""
    size = config.head_size
    middle = (size - 1) / 2
    # At least 0.5, to avoid a division by zero for heads of one channel.
    side = (_channels(config) % size - middle) / max(middle, 0.5)
    return side * jnp.abs(side)


def _depth(layer, config: RWKV7Config):
    """Computes the relative depth: 0 at the first block, 1 at the last."""
    return layer / max(config.num_layers - 1, 1)


def _remaining(layer, config: RWKV7Config):
    """Computes the remaining depth: 1 at the first block, 1 / L at the last."""
    return 1.0 - layer / config.num_layers


def lerp(power: float) -> Initial:
    """Makes the token-shift coefficients of time mix: 1 - (n / D)^(power * remaining depth)."""

    @_in_float32
    def initial(key, shape, layer, config):
        # Divided by D as in the source, unlike `_ramp`.
        channel = _channels(config) / config.width
        exponent = power * _remaining(layer, config)
        return 1.0 - channel**exponent

    return initial


@_in_float32
def ffn_lerp(key, shape, layer, config):
    """Computes the token-shift coefficients of channel mix."""
    channel = _channels(config) / config.width
    exponent = _remaining(layer, config) ** 4
    return 1.0 - channel**exponent


@_in_float32
def decay_bias(key, shape, layer, config):
    """Computes w0: slow decay in the first channels, fast in the last; steeper in deep blocks."""
    steepness = 1.0 + _depth(layer, config) ** 0.3
    ramp = _ramp(config) ** steepness
    # Two constants as in the source: their sum would round differently.
    return -6.0 + 6.0 * ramp + 0.5 + 2.5 * _zigzag(config)


@_in_float32
def icl_bias(key, shape, layer, config):
    """Computes a0."""
    return -0.19 + 0.3 * _zigzag(config) + 0.4 * (_ramp(config) - 0.5)


@_in_float32
def value_bias(key, shape, layer, config):
    """Computes v0."""
    return 0.73 - 0.4 * (_ramp(config) - 0.5)


@_in_float32
def removal_scale(key, shape, layer, config):
    """Computes k_k."""
    return 0.71 - 0.1 * (_ramp(config) - 0.5)


@_in_float32
def group_norm_weight(key, shape, layer, config):
    """Computes ln_x.weight, which grows with depth."""
    # From L^-0.7 in the first block to 1 in the last.
    scale = ((1 + layer) / config.num_layers) ** 0.7
    return jnp.full(shape, scale)


def constant(value: float) -> Initial:
    """Makes an initializer that fills an array with one number."""
    return lambda key, shape, layer, config: jnp.full(shape, value, jnp.float32)


def uniform(limit: float) -> Initial:
    """Makes an initializer of independent draws between -limit and limit."""
    return lambda key, shape, layer, config: jax.random.uniform(
        key, shape, jnp.float32, minval=-limit, maxval=limit
    )


def orthogonal(gain: float) -> Initial:
    """Makes an initializer of matrices with orthogonal rows of norm `gain`.

    If there are more rows than columns, the columns are orthogonal instead.
    """
    draw = jax.nn.initializers.orthogonal(gain)
    return lambda key, shape, layer, config: draw(key, shape, jnp.float32)


def low_rank_out(key, shape, layer, config):
    """Draws w2, a2, v2, g2: small orthogonal matrices, larger if the rank exceeds the width."""
    rank, width = shape
    gain = 0.1 * max(1.0, (rank / width) ** 0.5)
    return orthogonal(gain)(key, shape, layer, config)


def head(key, shape, layer, config):
    """Draws the output projection."""
    vocab_size, width = shape
    gain = 0.5 * max(1.0, (vocab_size / width) ** 0.5)
    return orthogonal(gain)(key, shape, layer, config)
