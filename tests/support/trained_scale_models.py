"""Random models like trained ones in scale, for comparisons with other implementations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state

# Matrices that a new model leaves at zero; the noise makes each of them count.
NOISE_OF_A_VECTOR = 0.1


def config(
    head_size: int = 64, *, num_layers: int = 2, width: int = 128, **changes
) -> RWKV7Config:
    """Sizes of a small model in the official format."""
    return RWKV7Config(
        vocab_size=97,
        num_layers=num_layers,
        width=width,
        head_size=head_size,
        **changes,
    )


@functools.cache
def calm(
    config: RWKV7Config, *, dtype: str = "float32", length: int = 64, seed: int = 0
):
    """Weights of every kind alive, and a head that gives logits of standard deviation 1."""
    # Weights are the same whatever implementation reads them, and the scan compiles fastest.
    model = RWKV7(dataclasses.replace(config, implementation="scan"))
    start = init_state(config)
    draw = jax.jit(
        lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32), start)["params"]
    )
    leaves, tree = jax.tree.flatten(
        jax.tree.map(np.asarray, draw(jax.random.key(seed)))
    )
    noise = np.random.default_rng(seed)

    def moved(x):
        wide = (
            0.5 / np.sqrt(x.shape[-1])
            if x.ndim > 1 and x.shape[-2] > 1
            else NOISE_OF_A_VECTOR
        )
        return jnp.asarray(x + wide * noise.normal(size=x.shape), jnp.float32)

    params = jax.tree.unflatten(tree, [moved(x) for x in leaves])
    logits = jax.jit(model.apply)({"params": params}, ids(config, 1, length), start)[0]
    params["head"]["weight"] = params["head"]["weight"] / jnp.std(logits)
    return jax.tree.map(lambda x: x.astype(dtype), params)


def ids(config: RWKV7Config, batch: int, length: int, *, seed: int = 1) -> jax.Array:
    """Random tokens."""
    random = np.random.default_rng(seed)
    return jnp.asarray(
        random.integers(0, config.vocab_size, (batch, length)), jnp.int32
    )


def start(config: RWKV7Config, batch: int = 1, *, seed: int = 2) -> RWKV7State:
    """A start state without any symmetry; shifts are zero, as in a tuned state."""
    empty = init_state(config, batch)
    draws = np.random.default_rng(seed).normal(size=empty.wkv.shape)
    return empty.replace(wkv=jnp.asarray(draws, jnp.float32))
