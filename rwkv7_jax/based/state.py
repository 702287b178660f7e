"""The state of a BASED model, and its size in bytes next to that of RWKV-7."""

import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import describe_fields
from rwkv7_jax.based.config import BasedConfig
from rwkv7_jax.based.taylor import feature_count
from rwkv7_jax.checks import check_count, check_instance, prefix_errors
from rwkv7_jax.model.casts import wide_dtype
from rwkv7_jax.model.config import RWKV7Config


# jaxtyping would check these fields whenever JAX rebuilds the tree with other leaves. Here they are
# documentation, and `check_based_state` checks them.
@typing.no_type_check
class ConvMemory(NamedTuple):
    """The last inputs of a short convolution, oldest first; zeros before the first token."""

    inputs: Float[Array, "B taps-1 D"]


@typing.no_type_check
class LinearMemory(NamedTuple):
    """The sums of linear attention; the last value channel is the normaliser."""

    sums: Float[Array, "B H M Nv+1"]


@typing.no_type_check
class WindowMemory(NamedTuple):
    """The last keys and values in a ring: the token at position p is in slot p mod S.

    Attributes:
        keys: of the last S tokens.
        values: of the last S tokens.
        position: tokens read so far, which determines the contents of the slots.
    """

    keys: Float[Array, "B S H N"]
    values: Float[Array, "B S H N"]
    position: Int[Array, " B"]


Memory = ConvMemory | LinearMemory | WindowMemory


@typing.no_type_check
@struct.dataclass
class BasedState:
    """The memory of a batch of sequences: one entry for each layer."""

    layers: tuple[Memory, ...]
    __repr__ = describe_fields

    @property
    def batch(self) -> int:
        """The number of sequences (B)."""
        return self.layers[0][0].shape[0]


def window_slots(config: BasedConfig, kind: str) -> int:
    """Returns the number of slots of the ring of a "window" or "attention" layer."""
    return config.window if kind == "window" else config.context


def _empty_memory(config: BasedConfig, kind: str, batch: int) -> Memory:
    heads = config.num_heads
    size = config.head_size
    if kind == "conv":
        shape = (batch, config.kernel_size - 1, config.width)
        return ConvMemory(jnp.zeros(shape, config.dtype))
    if kind == "linear":
        shape = (batch, heads, feature_count(config.feature_size), size + 1)
        return LinearMemory(jnp.zeros(shape, wide_dtype(config.dtype)))
    shape = (batch, window_slots(config, kind), heads, size)
    # Two arrays: one cannot be donated twice.
    return WindowMemory(
        keys=jnp.zeros(shape, config.dtype),
        values=jnp.zeros(shape, config.dtype),
        position=jnp.zeros(batch, jnp.int32),
    )


def init_based_state(config: BasedConfig, batch: int = 1) -> BasedState:
    """Makes the state of `batch` sequences before any token.

    Raises:
        TypeError: not a `BasedConfig`, or a batch that is not an integer.
        ValueError: a negative batch.
    """
    with prefix_errors("init_based_state"):
        check_instance(config, BasedConfig, "`config`")
        check_count(batch, 0, "`batch`")
    return BasedState(tuple(_empty_memory(config, k, batch) for k in config.layers))


def check_based_state(state: BasedState, batch: int, config: BasedConfig) -> None:
    """Checks that a state matches a model and a batch; works on arrays, tracers and shapes.

    Args:
        state: from `init_based_state` or a call.
        batch: the number of sequences (B).
        config: of the model.

    Raises:
        TypeError: not a `BasedState`, or a leaf of another dtype.
        ValueError: a leaf has the wrong shape, or layers are missing.
    """
    with prefix_errors("check_based_state"):
        check_instance(state, BasedState, "`state`")
        wanted = jax.eval_shape(lambda: init_based_state(config, batch))
        if jax.tree.structure(state) != jax.tree.structure(wanted):
            raise ValueError(
                f"`state` must hold the memories of layers {', '.join(config.layers)}; "
                "got others."
            )
        leaves = jax.tree_util.tree_leaves_with_path(state)
        for (path, leaf), like in zip(leaves, jax.tree.leaves(wanted), strict=True):
            name = f"`state{jax.tree_util.keystr(path)}`"
            if tuple(leaf.shape) != like.shape:
                raise ValueError(
                    f"{name} must have shape {like.shape}; got {tuple(leaf.shape)}."
                )
            if leaf.dtype != like.dtype:
                raise TypeError(f"{name} must be {like.dtype}; got {leaf.dtype}.")


class StateBytes(NamedTuple):
    """The size of one sequence's state in bytes.

    Attributes:
        matrix: the recurrent matrices, or the keys and values of the visible tokens.
        total: the whole state, with the inputs of convolutions, token shifts and positions.
    """

    matrix: int
    total: int


def state_bytes(
    config: BasedConfig | RWKV7Config, tokens: int, *, memory_size: int = 0
) -> StateBytes:
    """Computes the bytes that decoding carries for one sequence after some tokens.

    For a window or full attention, only filled slots of the ring count, although all are allocated.

    Args:
        config: of either kind of model.
        tokens: the number of tokens read so far.
        memory_size: features of a head (M) of an upscaled memory that changes in context; only for
            RWKV-7. A static memory is shared by all sequences like weights, and is not counted.

    Raises:
        TypeError: another type of config, or a number that is not an integer.
        ValueError: a negative number, or a memory for a model that has none.
    """
    with prefix_errors("state_bytes"):
        check_count(tokens, 0, "`tokens`")
        check_count(memory_size, 0, "`memory_size`")
        if not isinstance(config, BasedConfig | RWKV7Config):
            raise TypeError(
                "`config` must be a BasedConfig or an RWKV7Config; "
                f"got {type(config).__name__}."
            )
        if isinstance(config, BasedConfig) and memory_size:
            raise ValueError(
                f"`memory_size` must be 0 for a BasedConfig; got {memory_size}."
            )
    if isinstance(config, RWKV7Config):
        return _rwkv_bytes(config, memory_size)
    matrix = 0
    total = 0
    for kind in config.layers:
        one = _layer_bytes(config, kind, tokens)
        matrix += one.matrix
        total += one.total
    return StateBytes(matrix, total)


def _rwkv_bytes(config: RWKV7Config, memory_size: int) -> StateBytes:
    # D N of the state and D M of the memory, both float32.
    matrix = 4 * config.num_layers * config.width * (config.head_size + memory_size)
    shifts = 2 * config.num_layers * config.width * _item_size(config.dtype)
    return StateBytes(matrix, matrix + shifts)


def _layer_bytes(config: BasedConfig, kind: str, tokens: int) -> StateBytes:
    item = _item_size(config.dtype)
    if kind == "conv":
        return StateBytes(0, (config.kernel_size - 1) * config.width * item)
    if kind == "linear":
        # N + 1 channels per head, D + H in all.
        channels = config.width + config.num_heads
        matrix = feature_count(config.feature_size) * channels
        matrix *= _item_size(wide_dtype(config.dtype))
        return StateBytes(matrix, matrix)
    seen = min(window_slots(config, kind), tokens)
    matrix = 2 * config.width * seen * item
    return StateBytes(matrix, matrix + 4)  # the position is an int32


def _item_size(dtype: Any) -> int:
    return jnp.dtype(dtype).itemsize
