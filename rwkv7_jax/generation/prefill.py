"""Reading a long prompt into a state."""

import functools

import jax
import numpy as np
from jaxtyping import Int

from rwkv7_jax.array_types import Params
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state


@functools.partial(jax.jit, static_argnums=0)
def _prefill(model: RWKV7, params: Params, state: RWKV7State, tokens):
    return model.apply({"params": params}, tokens, state, method="hidden")[1]


def prefill_state(
    model: RWKV7, params: Params, tokens: Int[np.ndarray, " T"], *, chunk: int = 1024
) -> RWKV7State:
    """The state (batch 1) behind a prompt of any length, read in pieces from the zero state."""
    state = init_state(model.config)
    whole = len(tokens) // chunk * chunk
    for piece in [*np.split(tokens[:whole], max(whole // chunk, 1)), tokens[whole:]]:
        if len(piece):
            state = _prefill(model, params, state, np.asarray(piece, np.int32)[None])
    return state
