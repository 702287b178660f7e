"""What an RWKV-7 remembers between tokens: a pytree passed in and handed back. Level 2."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from .config import RWKV7Config


# The shaped fields would be checked whenever JAX rebuilds the tree with other leaves (under `vmap`,
# `scan`, `eval_shape`), so they are documentation here and checked by `check_state` instead.
@typing.no_type_check
@struct.dataclass
class RWKV7State:
    """The memory of a batch of sequences, all layers together.

    Attributes:
        att_shift: the last token's first-norm output of each layer, in the activations' dtype.
        wkv: the recurrent states, float32: rows are value channels, columns are key channels.
        ffn_shift: the last token's second-norm output of each layer, in the activations' dtype.
    """

    att_shift: Float[Array, "L B D"]
    wkv: Float[Array, "L B H Nv Nk"]
    ffn_shift: Float[Array, "L B D"]

    @property
    def batch(self) -> int:
        """Sequences held (B)."""
        return self.wkv.shape[1]


def init_state(config: RWKV7Config, batch: int = 1) -> RWKV7State:
    """The state of `batch` sequences that have read nothing: zeros."""
    shift = (config.num_layers, batch, config.width)
    heads = (config.num_layers, batch, config.num_heads, config.head_size, config.head_size)
    return RWKV7State(
        att_shift=jnp.zeros(shift, config.dtype),
        wkv=jnp.zeros(heads, jnp.float32),
        ffn_shift=jnp.zeros(shift, config.dtype),
    )


def check_state(state: RWKV7State, batch: int, config: RWKV7Config, *, caller: str) -> None:
    """Return if `state` belongs to this model and batch; works on arrays, tracers and shapes alike.

    Args:
        state: what shall be checked.
        batch: sequences it has to hold.
        config: the model's.
        caller: the public function's name, for the message.

    Raises:
        TypeError: not an `RWKV7State`, or the WKV state is not float32.
        ValueError: a leaf has the wrong shape.
    """
    if not isinstance(state, RWKV7State):
        raise TypeError(f"{caller}: `state` must be an RWKV7State; got {type(state).__name__}.")
    shift = (config.num_layers, batch, config.width)
    heads = (config.num_layers, batch, config.num_heads, config.head_size, config.head_size)
    for name, shape in (("att_shift", shift), ("wkv", heads), ("ffn_shift", shift)):
        if (came := tuple(getattr(state, name).shape)) != shape:
            raise ValueError(
                f"{caller}: `state.{name}` must have shape {shape} "
                f"(layers {config.num_layers}, batch {batch}, ...); got {came}."
            )
    if state.wkv.dtype != jnp.float32:
        raise TypeError(f"{caller}: `state.wkv` must be float32; got {state.wkv.dtype}.")


def check_tokens(tokens: Int[Array | np.ndarray, "..."], vocab_size: int, *, caller: str) -> None:
    """Return if the ids are integers and, where they are known, inside the vocabulary.

    Raises:
        TypeError: not integers.
        ValueError: an id is out of range; the message has its position.
    """
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{caller}: `tokens` must be integers; got {tokens.dtype}.")
    if isinstance(tokens, jax.core.Tracer):
        return
    ids = np.asarray(tokens)
    wrong = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        position = tuple(int(i) for i in wrong[0])
        raise ValueError(
            f"{caller}: `tokens` must be at least 0 and below {vocab_size}; "
            f"got {ids[position]} at position {position}."
        )


def repeat(state: RWKV7State, batch: int) -> RWKV7State:
    """`batch` sequences that all start from the one that `state` holds.

    Raises:
        ValueError: `state` holds more than one sequence.
    """
    if state.batch != 1:
        raise ValueError(f"repeat: `state` must hold one sequence; got {state.batch}.")
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (x.shape[0], batch, *x.shape[2:])), state)


def select(state: RWKV7State, rows) -> RWKV7State:
    """The sequences `rows` (an index, a slice or many indices) of `state`; the batch axis stays."""
    rows = jnp.atleast_1d(jnp.arange(state.batch)[rows])
    return jax.tree.map(lambda x: x[:, rows], state)


def stack(states: list[RWKV7State]) -> RWKV7State:
    """One batch of all the sequences in `states`, in their order."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *states)
