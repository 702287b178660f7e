"""Reads the state that tuning starts from: a state file, or the state after a prompt."""

import jax
import jax.numpy as jnp
import numpy as np

from rwkv7_jax import sharding
from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.integrity.file_signatures import container_of
from rwkv7_jax.checkpoints.model_files import model_hash
from rwkv7_jax.checkpoints.state_files import load_state
from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.data.readers import documents
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.local_paths import existing_path
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state
from rwkv7_jax.text.tokenizer import Tokenizer


def read_start_state(
    path: str,
    model: RWKV7,
    params: Params,
    tokenizer: Tokenizer,
    *,
    any_base: bool,
    may_be_upscaled: bool,
) -> RWKV7State:
    """Reads the state that a run starts from; always in float32.

    Args:
        path: a state file, or a text that the model reads as a prompt.
        model: the frozen model.
        params: its weights; with abstract weights, any state of the right shapes is accepted.
        tokenizer: tokenizer of the prompt.
        any_base: whether to accept a state of other weights.
        may_be_upscaled: whether the mode can tune the memory of an upscaled state.

    Raises:
        ValueError: the file is neither a state nor text, the state is upscaled and must not be, or
            it belongs to another model.
    """
    is_described = sharding.is_abstract(params)
    with prefix_errors("config.start"):
        if container_of(existing_path(path, "`config.start`")) is None:
            state = read_prompt(path, model, params, tokenizer)
        else:
            state = load_state(
                path,
                config=model.config,
                base_model=None if is_described else model_hash(params, model.config),
                any_base=any_base or is_described,
            )
        if state.upscaled is not None and not may_be_upscaled:
            raise ValueError(
                f"`{path}` holds an upscaled state, which only mode 'test_time' can tune further."
            )
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state)


def read_prompt(
    path: str, model: RWKV7, params: Params, tokenizer: Tokenizer
) -> RWKV7State:
    """Prefills all documents of a text and returns the state (batch 1).

    With abstract weights it returns zeros.

    Raises:
        ValueError: the text has no token.
    """
    if sharding.is_abstract(params):
        return init_state(model.config)
    ids: list[int] = []
    for document in documents(path):
        ids += tokenizer.encode(document.text())
    if not ids:
        raise ValueError(f"`{path}` must hold text; got none.")
    return prefill_state(model, params, np.asarray(ids))
