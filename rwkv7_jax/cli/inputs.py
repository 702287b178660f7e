"""What several commands read: a checkpoint with its hash, a state that fits it, a prompt."""

import os
import sys
from typing import NamedTuple

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints import load_model, load_state, model_hash
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State

# Of the arguments that are the same in several commands.
MODEL_HELP = "checkpoint: .pth, .safetensors or a folder"

PROMPT_HELP = "- reads standard input"


class LoadedModel(NamedTuple):
    """A checkpoint in memory.

    Attributes:
        hash: `model_hash`, to tell whose a state or an observer is.
    """

    params: Params
    config: RWKV7Config
    hash: str

    @property
    def module(self) -> RWKV7:
        """Returns the Linen module of these sizes."""
        return RWKV7(self.config)

    def load_state(self, path: str) -> RWKV7State:
        """Loads a state of this model's sizes; warns if it was tuned for other weights."""
        return load_state(path, config=self.config, base_model=self.hash)


def read_model(path: str) -> LoadedModel:
    """Loads a checkpoint and hashes its weights."""
    params, config = load_model(path)
    return LoadedModel(params, config, model_hash(params, config))


def read_prompt(argument: str) -> bytes:
    """Returns a prompt's bytes as they were given, whether or not they are UTF-8."""
    if argument == "-":
        return sys.stdin.buffer.read()
    # The inverse of how Python decodes the command line.
    return os.fsencode(argument)
