"""Prefill of one long prompt into a state."""

import functools

import jax
import numpy as np
from jaxtyping import Int

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import (
    check_count,
    check_ids,
    check_model,
    check_params,
    prefix_errors,
)
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state


# Not `decode_loop.prefill`: without lengths there is no mask to apply at every token.
@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    model: RWKV7,
    params: Params,
    state: RWKV7State,
    tokens,
):
    return model.apply({"params": params}, tokens, state, method="hidden")[1]


def prefill_state(
    model: RWKV7,
    params: Params,
    tokens: Int[np.ndarray, " T"],
    *,
    chunk: int = 1024,
) -> RWKV7State:
    """Reads a prompt of any length from the zero state, in chunks; computes no logits.

    Args:
        model: static.
        params: its weights.
        tokens: ids; none at all give the zero state.
        chunk: tokens that are read at once.

    Returns:
        The state after the prompt (batch 1).

    Raises:
        TypeError: ids that are not integers, or an argument of the wrong kind.
        ValueError: ids outside the vocabulary, weights of another model, or chunks below 1.
    """
    with prefix_errors("prefill_state"):
        check_model(model)
        check_params(params, model.config)
        check_count(chunk, 1, "`chunk`")
        tokens = check_ids(tokens, model.config.vocab_size, "`tokens`")
    state = init_state(model.config)
    # At most two programs are compiled: one for full chunks and one for the rest.
    for first in range(0, len(tokens), chunk):
        piece = np.asarray(tokens[first : first + chunk], np.int32)
        state = _prefill(model, params, state, piece[None])
    return state
