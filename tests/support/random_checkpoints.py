"""Random models for tests of files: every tensor random, no two sizes alike."""

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


def random_params(
    config: RWKV7Config = CONFIG, *, seed: int = 0, dtype=jnp.bfloat16, scale: float = 1.0
):
    """The parameter tree with normal entries of that standard deviation."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(
        lambda key: RWKV7(config).init(key, tokens, init_state(config))["params"],
        jax.random.key(0),
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s.shape), dtype), shapes)


def random_state(config: RWKV7Config = CONFIG, *, seed: int = 0) -> RWKV7State:
    """A start state with normal entries in the WKV part, and zero shifts."""
    empty = init_state(config)
    draws = np.random.default_rng(seed).normal(size=empty.wkv.shape)
    return empty.replace(wkv=jnp.asarray(draws, jnp.float32))


def differing(one, two) -> list[str]:
    """Leaves that differ in dtype, shape or any bit; leaves of one tree alone count."""
    flat = [dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (one, two)]
    names = {jax.tree_util.keystr(path) for path in flat[0].keys() ^ flat[1].keys()}
    for path in flat[0].keys() & flat[1].keys():
        a, b = (np.asarray(tree[path]) for tree in flat)
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            names.add(jax.tree_util.keystr(path))
    return sorted(names)
