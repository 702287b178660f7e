"""Prefill of one long prompt into a state."""

import numpy as np
from jaxtyping import Int

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import (
    check_count,
    check_ids,
    check_runnable,
    prefix_errors,
)
from rwkv7_jax.generation.decode_loop import prefill
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state


def prefill_state(
    model: RWKV7,
    params: Params,
    tokens: Int[np.ndarray, " T"],
    *,
    chunk: int = 1024,
) -> RWKV7State:
    """Prefills a prompt of any length from the zero state, in chunks, without computing logits.

    Args:
        model: the model.
        params: the weights.
        tokens: token ids; an empty prompt gives the zero state.
        chunk: number of tokens read at once.

    Returns:
        The state after the prompt, with batch size 1.

    Raises:
        TypeError: ids are not integers, or an argument has the wrong type.
        ValueError: ids are outside the vocabulary, the weights do not fit the model, or `chunk` is
            below 1.
    """
    with prefix_errors("prefill_state"):
        check_runnable(model, params)
        check_count(chunk, 1, "`chunk`")
        tokens = check_ids(tokens, model.config.vocab_size, "`tokens`")
    state = init_state(model.config)
    # Compiles at most two programs: one for full chunks, one for the rest.
    for first in range(0, len(tokens), chunk):
        part = tokens[None, first : first + chunk]
        state = prefill(model, params, state, tokens=part)
    return state
