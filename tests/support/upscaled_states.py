"""Upscaled memories of tiny models, empty and full."""

import jax.numpy as jnp
import numpy as np
from tiny_models import CONFIG

from rwkv7_jax.model.kernel_features import Features
from rwkv7_jax.model.state import init_state
from rwkv7_jax.tuning.upscaling import empty_memory

ADDITIVE = ("static", "decay", "delta")
SIZE = 24  # features of a head; its channels are 32


def noise(shape, seed=0, size=1.0):
    """Normal numbers of that standard deviation."""
    return jnp.asarray(
        size * np.random.default_rng(seed).normal(size=shape), jnp.float32
    )


def filled(state, seed=1, size=0.3, write=0.0):
    """The same state with something in its memory."""
    upscaled = state.upscaled
    memory = noise(upscaled.memory.shape, seed, size)
    return state.replace(
        upscaled=upscaled.replace(memory=memory, write=upscaled.write + write)
    )


def empty_state(config=CONFIG, dynamics="static"):
    """A state whose empty memory is read through features that no text was needed for."""
    places = (config.num_layers, 1, config.num_heads, SIZE)
    draws = np.random.default_rng(5).normal(size=(*places, config.head_size))
    landmarks = jnp.asarray(
        draws / np.linalg.norm(draws, axis=-1, keepdims=True), jnp.float32
    )
    widths = jnp.ones(places)
    identity = jnp.broadcast_to(jnp.eye(SIZE), (*places, SIZE))
    features = Features(
        landmarks=landmarks, widths=widths, mean=0.2 * widths, map=identity
    )
    return init_state(config).replace(
        upscaled=empty_memory(features, dynamics=dynamics)
    )
