"""Random models for tests of files: every tensor random, no two sizes alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state

CONFIG = RWKV7Config(
    vocab_size=75,
    num_layers=3,
    width=64,
    head_size=32,
    ffn_width=136,
    decay_rank=8,
    icl_rank=16,
    value_rank=24,
    gate_rank=40,
)


@functools.cache
def shapes_of(config: RWKV7Config):
    """Traces a new model, whose output matrices are zero: only its shapes are of use here."""

    def init(key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        return RWKV7(config).init(key, tokens, init_state(config))["params"]

    return jax.eval_shape(init, jax.random.key(0))


def random_params(
    config: RWKV7Config = CONFIG,
    *,
    seed: int = 0,
    dtype=jnp.bfloat16,
    scale: float = 1.0,
):
    """Makes a parameter tree with normal entries of standard deviation `scale`."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(scale * rng.normal(size=leaf.shape), dtype)

    return jax.tree.map(draw, shapes_of(config))


def random_state(config: RWKV7Config = CONFIG, *, seed: int = 0) -> RWKV7State:
    """Makes a start state with normal entries in the WKV part, and zero shifts."""
    empty = init_state(config)
    draws = np.random.default_rng(seed).normal(size=empty.wkv.shape)
    return empty.replace(wkv=jnp.asarray(draws, jnp.float32))


def differing(one, two) -> list[str]:
    """Lists the leaves that differ in dtype, shape or any bit, or that only one tree has."""
    ours = dict(jax.tree_util.tree_leaves_with_path(one))
    theirs = dict(jax.tree_util.tree_leaves_with_path(two))
    paths = ours.keys() ^ theirs.keys()
    for path in ours.keys() & theirs.keys():
        a = np.asarray(ours[path])
        b = np.asarray(theirs[path])
        # Bytes, so that NaN equals itself and -0 does not equal 0.
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            paths = paths | {path}
    return sorted(map(jax.tree_util.keystr, paths))
