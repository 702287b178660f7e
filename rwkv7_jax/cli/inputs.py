"""Inputs that several commands share: a checkpoint, its states and vocabulary, and a prompt."""

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
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.text.tokenizer import Tokenizer

# Help texts of arguments that several commands have.
MODEL_HELP = "checkpoint: .pth, .safetensors or a folder"

PROMPT_HELP = "- reads standard input"


def add_vocabulary_option(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds `--vocabulary` to a command.

    Args:
        parser: parser of the command.
        default: the default, for the help text.
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
        help="accept a state that was tuned for other weights",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the model and its form in memory."""
    add = parser.add_argument
    add("--model", required=True, type=path, help=MODEL_HELP)
    add(
        "--weights",
        choices=(INT8,),
        help="hold the model's matrices in 8 bits, which takes half or a quarter of the memory",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of activations and weights (float32 activations, and weights as in the file)",
    )


class LoadedModel(NamedTuple):
    """A checkpoint in memory.

    Attributes:
        hash: `model_hash`, which states and observers of this model name.
        path: path of the checkpoint.
    """

    params: Params
    config: RWKV7Config
    hash: str
    path: str

    @property
    def module(self) -> RWKV7:
        """The Linen module of the model."""
        return RWKV7(self.config)

    def load_state(self, path: str, *, any_base: bool) -> RWKV7State:
        """Loads a state of this model; `any_base` also accepts one of other weights."""
        return load_state(
            path,
            config=self.config,
            base_model=self.hash,
            any_base=any_base,
        )

    def tokenizer(self, vocabulary: str | None) -> Tokenizer:
        """Returns the tokenizer of `--vocabulary`, or that of the model."""
        return model_tokenizer(
            self.path,
            self.config.vocab_size,
            vocabulary,
            argument="`--vocabulary`",
        )


def read_model(
    path: str, *, weights: str | None = None, dtype: str | None = None
) -> LoadedModel:
    """Loads a checkpoint and hashes its weights, with messages while that takes long.

    Args:
        path: path of the checkpoint.
        weights: argument of `load_model`.
        dtype: dtype of activations and of weights except int8 matrices; None for float32
            activations and weights as in the file.
    """
    with report_wait(f"the weights of {path}"):
        params, config = load_model(path, weights=weights)
        # The hash of the file's values: states fit the model in every dtype.
        origin = model_hash(params, config)
        if dtype is not None:
            config = dataclasses.replace(config, dtype=dtype)
            _convert(params, dtype)
    return LoadedModel(params, config, origin, path)


def _convert(params: MutableMapping[str, Any], dtype: str) -> None:
    """Converts weights in place, so that only one leaf needs extra memory."""
    for name, node in params.items():
        if isinstance(node, MutableMapping):
            _convert(node, dtype)
        elif not is_int8(node):
            params[name] = node.astype(dtype)


def read_prompt(argument: str) -> bytes:
    """Returns the original bytes of a prompt, which need not be UTF-8."""
    if argument == "-":
        return sys.stdin.buffer.read()
    # Recover the bytes of the command line.
    return os.fsencode(argument)
