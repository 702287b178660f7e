"""The state that tuning starts from: of a file, or of a model that has read a prompt."""

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
    """Reads the state that a run starts from, in float32 whatever the model computes in.

    Args:
        path: a state's file, or a text, which the model reads as a prompt.
        model: the frozen model.
        params: its weights; where they are only described, any state of their sizes is taken.
        tokenizer: of the prompt.
        any_base: take a state of other weights.
        may_be_upscaled: whether the mode tunes the memory of an upscaled state further.

    Raises:
        ValueError: a file that holds neither, an upscaled state where it may not be one, or a state
            of another model.
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
                f"`{path}` holds an upscaled state, which mode 'test_time' alone tunes further."
            )
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state)


def read_prompt(
    path: str, model: RWKV7, params: Params, tokenizer: Tokenizer
) -> RWKV7State:
    """Returns the state after all documents of a text have been read (batch 1).

    Weights that are only described read nothing: the state is empty.

    Raises:
        ValueError: a text without a token.
    """
    if sharding.is_abstract(params):
        return init_state(model.config)
    ids: list[int] = []
    for document in documents(path):
        ids += tokenizer.encode(document.text())
    if not ids:
        raise ValueError(f"`{path}` must hold text; got none.")
    return prefill_state(model, params, np.asarray(ids))
