"""A decoding step through unrolled layers, each with its own arrays.

The model scans over stacked weights, which keeps programs small. In decoding this is slow: XLA
copies each layer's weights out of the stack before a product (always on CPUs; on GPUs if the
product is a library call), and stacks the layers' states again at every token. For a TPU the WKV
states also take the layout of its kernel for single tokens (`pallas_kernels.tpu.token_step`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch, platforms
from pallas_kernels.tpu import token_step
from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import is_traced
from rwkv7_jax.model.block import Block, Norm
from rwkv7_jax.model.casts import widened
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.layer_states import state_after
from rwkv7_jax.model.rwkv7 import Embedding, Head
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.sharding import mesh_sizes

# The vectors that the model reads in float32, by the last part of their names.
_READ_WIDE = ("weight", "bias", "w0", "a0", "v0")

# One entry per layer, without the axis L.
LayerStates = tuple[RWKV7State, ...]


def split_params(params: Params) -> Params:
    """Gives each layer its own weights: "layer_1" and so on instead of "layers".

    On a single CPU device they are views of the stacked weights; elsewhere they are copies. All
    other arrays are those of `params`, except that a TPU gets vectors in float32 that are read in
    it: XLA would convert each of them at every token.
    """
    split = {name: node for name, node in params.items() if name != "layers"}
    if "layers" in params:
        leaves = jax.tree.leaves(params["layers"])
        take = _view_layer if all(map(_is_on_host, leaves)) else _copy_layer
        for index in range(len(leaves[0])):
            split[f"layer_{index + 1}"] = take(params["layers"], index)
    if platforms.target_platform() == "tpu":
        return jax.tree_util.tree_map_with_path(_widen_vector, split)
    return split


def _widen_vector(path: tuple, leaf: Array) -> Array:
    """Converts the weight or bias of a norm, or the bias of a low-rank map, to float32."""
    name = getattr(path[-1], "key", None)
    return widened(leaf) if leaf.ndim == 1 and name in _READ_WIDE else leaf


def _is_on_host(leaf: Any) -> bool:
    """Tells whether a leaf is an array in the memory of one CPU device."""
    if is_traced(leaf) or not isinstance(leaf, jax.Array):
        return False
    if not isinstance(leaf.sharding, SingleDeviceSharding):
        return False
    (device,) = leaf.devices()
    return leaf.is_fully_addressable and device.platform == "cpu"


def _view_layer(stack: Params, index: int) -> Params:
    """Makes views of a layer in the stack's memory; JAX copies arrays that are not aligned.

    They keep the stack's memory alive, so a program that is given the stack to donate copies it.
    """

    def view(leaf):
        target = leaf.sharding if leaf.committed else None
        return jax.device_put(np.asarray(leaf)[index], target, may_alias=True)

    return jax.tree.map(view, stack)


# The index is traced: a single program for all layers would take seconds to compile.
@jax.jit
def _copy_layer(stack: Params, index: Int[Array, ""]) -> Params:
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack
    )


def split_state(state: RWKV7State, implementation: str | None = None) -> LayerStates:
    """Splits a state into one entry per layer.

    Args:
        state: of all layers.
        implementation: of the WKV op. For a TPU, the WKV states are tiled if it may be the kernel
            for single tokens.
    """
    takes_tiles = not mesh_sizes() and dispatch.takes_tiles(implementation, state.wkv)
    layers = []
    for index in range(state.wkv.shape[0]):
        layer = jax.tree.map(lambda leaf, at=index: leaf[at], state)
        if takes_tiles:
            layer = layer.replace(wkv=token_step.tile(layer.wkv))
        layers.append(layer)
    return tuple(layers)


def join_states(layers: LayerStates) -> RWKV7State:
    """Inverts `split_state`."""
    plain = []
    for layer in layers:
        if isinstance(layer.wkv, token_step.TiledState):
            layer = layer.replace(wkv=token_step.untile(layer.wkv))
        plain.append(layer)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *plain)


def read_token(
    config: RWKV7Config,
    params: Params,
    layers: LayerStates,
    *,
    tokens: Int[Array, " B"],
    live: Bool[Array, " B"],
) -> tuple[Float[Array, "B V"], LayerStates]:
    """Computes the next token's logits and the states after one token, as the model does.

    Args:
        config: of the model.
        params: from `split_params`.
        layers: from `split_state`.
        tokens: one id per row.
        live: the rows that read their token; the states of the others do not change.
    """

    def run(module, name: str, *arguments: Any) -> Any:
        return module.apply({"params": params[name]}, *arguments)

    # A row of length 0 keeps its state.
    lengths = live.astype(jnp.int32)
    x = run(Embedding(config), "emb", tokens[:, None]).astype(config.dtype)
    x = run(Norm(config), "ln0", x)
    v_first = None
    after = []
    for index, state in enumerate(layers):
        block = Block(config, index == 0, ())
        x, (memories, values, _) = run(
            block, f"layer_{index}", x, state, index, v_first, lengths
        )
        if index == 0:
            v_first = values
        after.append(state_after(state, memories))
    x = run(Norm(config), "ln_out", x)
    return run(Head(config), "head", x)[:, 0], tuple(after)
