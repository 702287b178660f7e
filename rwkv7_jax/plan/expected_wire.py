"""The bytes that a step should send, by the layout of its weights alone.

* A sharded matrix is all-gathered when its block runs, in the forward pass and again in the
  backward pass.
* The matrix of the head is gathered once. So are those of the first block, which is outside the
  scan over layers: a compiler may merge the two gathers (the CPU's does, the TPU's does not).
* Only rows of the embedding are sent.
* If weights are trained, one reduce-scatter gives each device the gradient of its shard. An
  all-reduce averages shards that several groups of devices hold.
* Start states and their gradients are replicated, except for heads that are sharded.
* The devices of a stack update their own start states, and then all-gather the states and moments.
* With sharded heads (`tensor`), devices hold separate parts of matrices and states. They sum the
  outputs of time mix and of channel mix in the forward pass, in the backward pass, and time mix
  once more if a block is recomputed.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rwkv7_jax.plan.collectives import wire_bytes
from rwkv7_jax.sharding.layout import FSDP, TENSOR, axes_of, path_name, spec
from rwkv7_jax.training.costs import tree_bytes


def expected_wire_bytes(
    weights: Any,
    sizes: Mapping[str, int],
    *,
    trained: Any,
    dtype: str,
    tokens: int,
    recomputed: bool = False,
    microbatches: int = 1,
    stack: Any = (),
) -> float:
    """Computes the bytes that one device sends in a step.

    Args:
        weights: abstract weights of the model.
        sizes: sizes of the mesh axes, by name.
        trained: abstract parameters with gradients: the weights themselves or a start state.
        dtype: dtype of activations, in which wider weights are gathered.
        tokens: tokens that one device reads in a microbatch.
        recomputed: whether the backward pass recomputes each block.
        microbatches: of a step; each gathers the weights and reduces the gradients.
        stack: abstract states and moments of a stack, which has no gradients to reduce; then
            `trained` is empty.
    """
    parts = sizes.get(FSDP, 1)
    devices = math.prod(sizes.values())
    is_trained = trained is weights
    rows = tokens * weights["emb"]["weight"].shape[-1] * jnp.dtype(dtype).itemsize
    total = _summed_bytes(weights, sizes, rows, recomputed)
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        name = path_name(path)
        axes = _axes_that_cut(name, leaf, sizes)
        if FSDP not in axes:
            continue
        if name.startswith("emb/"):
            total += (1 + is_trained) * wire_bytes("all-to-all", parts, rows)
            continue
        size = leaf.size * min(leaf.dtype.itemsize, jnp.dtype(dtype).itemsize)
        gathered = size // (sizes[TENSOR] if TENSOR in axes else 1)
        times = 1 if name.startswith(("head/", "layer_0/")) else 2
        total += times * wire_bytes("all-gather", parts, gathered)
        if is_trained:
            total += wire_bytes("reduce-scatter", parts, gathered // parts)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        axes = _axes_that_cut(path_name(path), leaf, sizes)
        cut = math.prod(sizes[axis] for axis in axes)
        # An all-reduce uses the dtype of the parameters; only gathers and scatters cast.
        own = leaf.size * leaf.dtype.itemsize // cut
        total += wire_bytes("all-reduce", devices // cut, own)
    shared = wire_bytes("all-gather", devices, tree_bytes(stack))
    return microbatches * total + shared


def _axes_that_cut(name: str, leaf: Any, sizes: Mapping[str, int]) -> set[str]:
    """Returns the mesh axes along which a leaf is sharded."""
    found: set[str] = set()
    for entry in spec(name, leaf.shape, sizes):
        found.update(axes_of(entry))
    return found


def _summed_bytes(
    weights: Any, sizes: Mapping[str, int], rows: int, recomputed: bool
) -> float:
    """Computes the bytes that a device sends because heads are sharded.

    Args:
        weights: abstract weights of the model.
        sizes: sizes of the mesh axes, by name.
        rows: bytes of the activations of a device's tokens.
        recomputed: whether the backward pass recomputes each block.
    """
    heads = sizes.get(TENSOR, 1)
    layers = 1
    if "layers" in weights:
        layers += weights["layers"]["att"]["w0"].shape[0]
    sums = layers * (5 if recomputed else 4)
    # Each device computes the head's gradient for some of the tokens.
    given_back = wire_bytes("all-gather", heads, rows)
    return sums * wire_bytes("all-reduce", heads, rows) + given_back
