"""Rows cut in two: a prompt that is read, and the tokens behind it that are answered.

`split` [B] counts the tokens of each row's prompt. The answers are what the model says when it
reads on from there: inputs from position `split` on, their targets one later. The prediction of the
first token behind the prompt is still the prompt's.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import Lengths, Tokens
from rwkv7_jax.checks import check_lengths, check_tokens
from rwkv7_jax.data.batch import Batch, BatchLike

# Keeps these draws apart from those that a task makes of the same seed and step.
_STREAM = 7919


def add_prompt_splits(
    batch: BatchLike, seed: int, step: int, *, least: int = 1, most: int | None = None
) -> Batch:
    """The batch with a `split` for every row, drawn evenly from `least` to `most`, both included.

    Args:
        batch: tokens [B T+1] and what else it holds.
        seed: with the step, all that the draw depends on.
        step: from 0.
        least: tokens of the shortest prompt.
        most: of the longest; T - 1, which leaves one answer, where it is not given.

    Raises:
        ValueError: bounds outside of 0 to T, or in the wrong order.
    """
    batch = Batch.of(batch, caller="add_prompt_splits")
    rows, length = batch.tokens.shape[0], batch.tokens.shape[1] - 1
    most = length - 1 if most is None else most
    if not 0 <= least <= most <= length:
        raise ValueError(
            f"add_prompt_splits: `least` and `most` must be in order between 0 and {length}, "
            f"the row's inputs; got {least} and {most}."
        )
    draw = np.random.default_rng([seed, step, _STREAM]).integers(least, most + 1, rows)
    return batch.replace(split=draw.astype(np.int32))


def check_split(batch: BatchLike, vocab_size: int, *, caller: str) -> Batch:
    """Checks that `batch` has tokens [B T+1], a mask [B T] and a split [B] that fit each other.

    Raises:
        TypeError: ids or splits that are no integers.
        ValueError: a part is missing or misshapen, or an id or a split is out of range.
    """
    batch = Batch.of(batch, "mask", "split", caller=caller)
    shape = tuple(batch.tokens.shape)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(
            f"{caller}: `batch['tokens']` must be [B T+1] with T at least 1; got shape {shape}."
        )
    inputs = (shape[0], shape[1] - 1)
    if (came := tuple(batch.mask.shape)) != inputs:
        raise ValueError(f"{caller}: `batch['mask']` must have shape {inputs}; got {came}.")
    check_tokens(batch.tokens, vocab_size, caller=caller)
    check_lengths(batch.split, inputs, caller=caller, name="batch['split']")
    return batch


def continuations(
    tokens: Tokens, split: Lengths, weights: Float[Array, "B C"]
) -> tuple[Int[Array, "B C"], Int[Array, "B C"], Float[Array, "B C"]]:
    """What is behind every row's split, moved to the front: inputs, targets, shares of the loss.

    The shares are zero behind a tail's end and add up to 1 over the batch; to 0 if nothing counts.

    Args:
        tokens: [B T+1].
        split: tokens of each row's prompt.
        weights: of the T targets, in any scale; those in the prompt do not matter.
    """
    length = weights.shape[1]
    place = jnp.arange(length)[None] + jnp.asarray(split)[:, None]
    counts = (place < length).astype(weights.dtype)
    tokens = jnp.asarray(tokens)
    inputs, targets, weights = (
        jnp.take_along_axis(x, place % length, axis=1)
        for x in (tokens[:, :-1], tokens[:, 1:], weights)
    )
    weights = weights * counts
    total = jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)
    return inputs, targets, weights / total
