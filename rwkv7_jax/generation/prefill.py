"""Prefill: compiled programs that read prompts into states, without logits.

The model is a static argument, any module with the methods of RWKV-7; the weights are traced.
Programs are specialised on the batch size and on widths that are powers of two.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Int

from pallas_kernels import platforms
from rwkv7_jax.array_types import Lengths, Params, Tokens
from rwkv7_jax.checks import (
    check_count,
    check_ids,
    check_runnable,
    prefix_errors,
)
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state

# Width of the narrowest prefill program; wider ones are powers of two.
NARROWEST = 16

# Prompt tokens of a row that a CPU reads at once. Its time grows with the number of tokens.
_CPU_CHUNK = 256

# Prompt tokens, over all rows, that other devices read at once. With few tokens they mostly wait
# for their next kernel: an H100 reads 128 tokens of the 0.4B model in 4 ms and 16,384 in 52 ms
# (docs/kernels.md).
_TOKENS_AT_ONCE = 4096


@functools.partial(jax.jit, static_argnums=0)
def prefill(
    model: nn.Module,
    params: Params,
    state: RWKV7State,
    *,
    tokens: Tokens,
    lengths: Lengths | None = None,
) -> RWKV7State:
    """Reads the first `lengths` tokens of each row without computing logits.

    Without lengths all tokens are read, which saves the mask.
    """
    outputs: Any = model.apply(
        {"params": params}, tokens, state, lengths, method="hidden"
    )
    return outputs[1]


def prefill_rows(
    model: nn.Module,
    params: Params,
    state: RWKV7State,
    rows: Sequence[Sequence[int]],
    *,
    chunk: int,
) -> RWKV7State:
    """Reads rows of any lengths, `chunk` tokens at a time; an empty row keeps its state."""
    for first, width in chunk_widths(max(map(len, rows)), chunk):
        tokens, lengths = cut_chunk(rows, first, width)
        state = prefill(model, params, state, tokens=tokens, lengths=lengths)
    return state


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


def default_chunk(batch: int) -> int:
    """Returns how many prompt tokens of each of `batch` rows a program should read at once."""
    if platforms.target_platform() == "cpu":
        return _CPU_CHUNK
    return max(_CPU_CHUNK, _TOKENS_AT_ONCE // power_of_two(batch))


def chunk_widths(total: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Yields the start of each chunk of `total` tokens and the width of its program."""
    for first in range(0, total, chunk):
        yield first, min(chunk, max(NARROWEST, power_of_two(total - first)))


def cut_chunk(
    rows: Sequence[Sequence[int]], first: int, width: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Returns the tokens from `first` on of each row, padded to `width`, and their number."""
    tokens = np.zeros((len(rows), width), np.int32)
    lengths = np.zeros(len(rows), np.int32)
    for index, row in enumerate(rows):
        part = row[first : first + width]
        tokens[index, : len(part)] = part
        lengths[index] = len(part)
    return tokens, lengths


def power_of_two(least: int) -> int:
    """Returns the smallest power of two that is at least `least`."""
    return 1 << max(least - 1, 0).bit_length()
