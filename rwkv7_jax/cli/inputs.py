"""What several commands read: a checkpoint with its hash, a state that fits it, a prompt."""

import argparse
import dataclasses
import os
import sys
from collections.abc import MutableMapping
from typing import Any, NamedTuple

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints import (
    load_model,
    load_state,
    model_hash,
    model_tokenizer,
)
from rwkv7_jax.cli.arguments import path
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.int8_weights import INT8, is_int8
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.text.tokenizer import Tokenizer

# Of the arguments that are the same in several commands.
MODEL_HELP = "checkpoint: .pth, .safetensors or a folder"

PROMPT_HELP = "- reads standard input"


def add_vocabulary_option(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds `--vocabulary` to a command.

    Args:
        parser: of the command.
        default: which vocabulary is taken without the option, for the help.
    """
    parser.add_argument(
        "--vocabulary",
        type=path,
        metavar="NAME",
        help="world, bytes, bytes256 (raw), ids (numbers), a vocabulary file or a tokenizer.json "
        f"({default})",
    )


def add_any_base_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--any-base` to a command that starts a model from a state."""
    parser.add_argument(
        "--any-base",
        action="store_true",
        help="take a state that was tuned for other weights",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the model and how it is held in memory."""
    add = parser.add_argument
    add("--model", required=True, type=path, help=MODEL_HELP)
    add(
        "--weights",
        choices=(INT8,),
        help="hold the model's matrices in 8 bits, in half or a quarter of the memory",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of activations and weights (float32 activations and the weights of the file)",
    )


class LoadedModel(NamedTuple):
    """A checkpoint in memory.

    Attributes:
        hash: `model_hash`, to tell whose a state or an observer is.
        path: of the checkpoint.
    """

    params: Params
    config: RWKV7Config
    hash: str
    path: str

    @property
    def module(self) -> RWKV7:
        """Returns the Linen module of these sizes."""
        return RWKV7(self.config)

    def load_state(self, path: str, *, any_base: bool) -> RWKV7State:
        """Loads a state of this model's sizes; `any_base` takes one of other weights, too."""
        return load_state(
            path,
            config=self.config,
            base_model=self.hash,
            any_base=any_base,
        )

    def tokenizer(self, vocabulary: str | None) -> Tokenizer:
        """Returns the vocabulary that `--vocabulary` names, or else that of the model."""
        return model_tokenizer(
            self.path,
            self.config.vocab_size,
            vocabulary,
            argument="`--vocabulary`",
        )


def read_model(
    path: str, *, weights: str | None = None, dtype: str | None = None
) -> LoadedModel:
    """Loads a checkpoint and hashes its weights.

    Args:
        path: of the checkpoint.
        weights: that of `load_model`.
        dtype: of activations and weights, matrices in 8 bits excepted; None is float32 activations
            and the weights of the file.
    """
    params, config = load_model(path, weights=weights)
    # Of the file's numbers: its states fit it in whatever dtype it computes.
    origin = model_hash(params, config)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
        _convert(params, dtype)
    return LoadedModel(params, config, origin, path)


def _convert(params: MutableMapping[str, Any], dtype: str) -> None:
    """Converts weights in place, so that memory is needed for one leaf more and not for all."""
    for name, node in params.items():
        if isinstance(node, MutableMapping):
            _convert(node, dtype)
        elif not is_int8(node):
            params[name] = node.astype(dtype)


def read_prompt(argument: str) -> bytes:
    """Returns a prompt's bytes as they were given, whether or not they are UTF-8."""
    if argument == "-":
        return sys.stdin.buffer.read()
    # The inverse of how Python decodes the command line.
    return os.fsencode(argument)
