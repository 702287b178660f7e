"""The bytes that a step should send, by the layout of its weights alone.

A matrix in shards is gathered at its block's door in the forward pass and again in the backward
pass. The head's and those of the first block, which is outside of the scan over layers, are
gathered once: there the compiler merges the two. Where weights are trained, each device gets the
gradient of its own shard by one reduce-scatter, and shards that several groups of devices hold are
averaged by an all-reduce. Of the embedding, rows travel. Start states are whole on each device, and
so are their gradients.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rwkv7_jax.plan.collectives import wire_bytes
from rwkv7_jax.sharding.layout import DATA, FSDP, leaf_name, spec


def expected_wire_bytes(
    weights: Any,
    sizes: Mapping[str, int],
    *,
    trained: Any,
    dtype: str,
    tokens: int,
) -> float:
    """Computes the bytes that one device sends in a step.

    Args:
        weights: of the model, described.
        sizes: of the mesh's axes, by name.
        trained: parameters with gradients, described: the weights themselves or a start state.
        dtype: of activations, in which wider weights are gathered.
        tokens: that one device reads in a step.
    """
    groups = sizes.get(DATA, 1)
    parts = sizes.get(FSDP, 1)
    devices = math.prod(sizes.values())
    is_trained = trained is weights
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        name = leaf_name(path)
        in_shards = FSDP in spec(name, leaf.shape, sizes)
        gathered = leaf.size * min(leaf.dtype.itemsize, jnp.dtype(dtype).itemsize)
        if in_shards and name.startswith("emb/"):
            rows = tokens * leaf.shape[-1] * jnp.dtype(dtype).itemsize
            total += (1 + is_trained) * wire_bytes("all-to-all", parts, rows)
        elif in_shards:
            times = 1 if name.startswith(("head/", "layer_0/")) else 2
            total += times * wire_bytes("all-gather", parts, gathered)
        if not is_trained:
            continue
        if in_shards:
            if not name.startswith("emb/"):
                total += wire_bytes("reduce-scatter", parts, gathered // parts)
            total += wire_bytes("all-reduce", groups, gathered // parts)
        else:
            total += wire_bytes("all-reduce", devices, gathered)
    if not is_trained:
        for leaf in jax.tree.leaves(trained):
            size = math.prod(leaf.shape) * leaf.dtype.itemsize
            total += wire_bytes("all-reduce", devices, size)
    return total
