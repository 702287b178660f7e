"""The bytes that a step should send, by the layout of its weights alone.

A matrix in shards is gathered when its block runs, in the forward pass and again in the backward
pass. The head's is gathered once; so are those of the first block, which is outside of the scan
over layers, where a compiler may merge the two (that of CPUs does, a TPU's gathers them again).
Where weights are trained, each device gets the gradient of its own shard by one reduce-scatter, and
shards that several groups of devices hold are averaged by an all-reduce. Of the embedding, only
rows are sent. Start states and their gradients are replicated, but for those of heads that several
devices share.

Devices that share heads have their own matrices and states, and sum what a block's two halves add
to the residual stream: in the forward pass, in the backward pass, and the first half again where a
block is computed again.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rwkv7_jax.plan.collectives import wire_bytes
from rwkv7_jax.sharding.layout import FSDP, TENSOR, axes_of, path_name, spec


def expected_wire_bytes(
    weights: Any,
    sizes: Mapping[str, int],
    *,
    trained: Any,
    dtype: str,
    tokens: int,
    recomputed: bool = False,
) -> float:
    """Computes the bytes that one device sends in a step.

    Args:
        weights: of the model, described.
        sizes: of the mesh's axes, by name.
        trained: parameters with gradients, described: the weights themselves or a start state.
        dtype: of activations, in which wider weights are gathered.
        tokens: that one device reads in a step.
        recomputed: whether the backward pass computes each block again.
    """
    parts = sizes.get(FSDP, 1)
    devices = math.prod(sizes.values())
    is_trained = trained is weights
    rows = tokens * weights["emb"]["weight"].shape[-1] * jnp.dtype(dtype).itemsize
    total = _summed_bytes(weights, sizes, rows, recomputed)
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        name = path_name(path)
        axes = _axes_that_cut(name, leaf, sizes)
        in_shards = FSDP in axes
        size = leaf.size * min(leaf.dtype.itemsize, jnp.dtype(dtype).itemsize)
        gathered = size // (sizes[TENSOR] if TENSOR in axes else 1)
        if in_shards and name.startswith("emb/"):
            total += (1 + is_trained) * wire_bytes("all-to-all", parts, rows)
        elif in_shards:
            times = 1 if name.startswith(("head/", "layer_0/")) else 2
            total += times * wire_bytes("all-gather", parts, gathered)
        if not is_trained:
            continue
        if in_shards and not name.startswith("emb/"):
            total += wire_bytes("reduce-scatter", parts, gathered // parts)
        cut = math.prod(sizes[axis] for axis in axes)
        # A sum is taken in the dtype of the weights; only what is gathered or scattered is cast.
        own = leaf.size * leaf.dtype.itemsize
        total += wire_bytes("all-reduce", devices // cut, own // cut)
    if not is_trained:
        for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
            axes = _axes_that_cut(path_name(path), leaf, sizes)
            cut = math.prod(sizes[axis] for axis in axes)
            size = math.prod(leaf.shape) * leaf.dtype.itemsize
            total += wire_bytes("all-reduce", devices // cut, size // cut)
    return total


def _axes_that_cut(name: str, leaf: Any, sizes: Mapping[str, int]) -> set[str]:
    """Returns the mesh axes along which a leaf lies in parts."""
    found: set[str] = set()
    for entry in spec(name, leaf.shape, sizes):
        found.update(axes_of(entry))
    return found


def _summed_bytes(
    weights: Any, sizes: Mapping[str, int], rows: int, recomputed: bool
) -> float:
    """Computes the bytes that devices send which share heads.

    Args:
        weights: of the model.
        sizes: of the mesh's axes, by name.
        rows: bytes of the activations of a device's tokens.
        recomputed: whether the backward pass computes each block again.
    """
    heads = sizes.get(TENSOR, 1)
    layers = 1
    if "layers" in weights:
        layers += weights["layers"]["att"]["w0"].shape[0]
    sums = layers * (5 if recomputed else 4)
    # The gradient that comes back from the head, of which each device has some tokens.
    given_back = wire_bytes("all-gather", heads, rows)
    return sums * wire_bytes("all-reduce", heads, rows) + given_back
