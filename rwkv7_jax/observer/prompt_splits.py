"""Prompt/continuation splits; only the continuation counts in the loss.

`split` [B] counts the tokens of each row's prompt. The answers are the predictions of a model that
reads on from there: inputs from position `split` on, their targets one later. The prediction of the
first token after the prompt still belongs to the prompt.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import Lengths, Tokens
from rwkv7_jax.checks import check_lengths, check_tokens, prefix_errors
from rwkv7_jax.data.batch import Batch, BatchLike

# Keeps these draws apart from those that a task makes of the same seed and step.
_STREAM = 7919


def add_prompt_splits(
    batch: BatchLike, seed: int, step: int, *, least: int = 1, most: int | None = None
) -> Batch:
    """Draws a `split` for every row, uniformly from `least` to `most`, both included.

    Args:
        batch: tokens [B T+1], and any other fields.
        seed: the draw depends on it and the step alone.
        step: from 0.
        least: tokens of the shortest prompt.
        most: tokens of the longest; None for T - 1, which leaves one answer.

    Raises:
        ValueError: bounds outside of 0 to T, or in the wrong order.
    """
    batch = Batch.of(batch, caller="add_prompt_splits")
    rows = batch.tokens.shape[0]
    # The last id of a row is only a target.
    length = batch.tokens.shape[1] - 1
    # A prompt of T tokens is allowed on request, but leaves no answer.
    longest = length - 1 if most is None else most
    if not 0 <= least <= longest <= length:
        raise ValueError(
            f"add_prompt_splits: `least` and `most` must be in order between 0 and {length}, "
            f"the row's inputs; got {least} and {longest}."
        )
    # From seed and step alone, so that a resumed run draws the same splits.
    rng = np.random.default_rng([seed, step, _STREAM])
    # NumPy leaves the upper bound out.
    split = rng.integers(least, longest + 1, rows)
    return batch.replace(split=split.astype(np.int32))


def check_split(batch: BatchLike, vocab_size: int, *, caller: str) -> Batch:
    """Checks that `batch` has tokens [B T+1], a mask [B T] and a split [B] that fit each other.

    Raises:
        TypeError: ids or splits that are not integers.
        ValueError: a part is missing or misshapen, or an id or a split is out of range.
    """
    batch = Batch.of(batch, "mask", "split", caller=caller)
    with prefix_errors(caller):
        _check_shapes(batch, vocab_size)
    return batch


def _check_shapes(batch: Batch, vocab_size: int) -> None:
    shape = tuple(batch.tokens.shape)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(
            f"`batch['tokens']` must be [B T+1] with T at least 1; got shape {shape}."
        )
    inputs = (shape[0], shape[1] - 1)
    mask = tuple(batch["mask"].shape)
    if mask != inputs:
        raise ValueError(f"`batch['mask']` must have shape {inputs}; got {mask}.")
    check_tokens(batch.tokens, vocab_size)
    check_lengths(batch["split"], inputs, name="batch['split']")


def after_split(split: Lengths, length: int) -> Float[Array, "B T"]:
    """Marks the targets after each row's split with 1."""
    place = jnp.arange(length)[None]
    return (place >= jnp.asarray(split)[:, None]).astype(jnp.float32)


def continuations(
    tokens: Tokens,
    split: Lengths,
    weights: Float[Array, "B C"],
    *,
    total: Float[Array, ""] | None = None,
) -> tuple[Int[Array, "B C"], Int[Array, "B C"], Float[Array, "B C"]]:
    """Moves the part after every row's split to the front: inputs, targets, shares of the loss.

    The shares are zero after the end of a row and add up to 1 over the batch; to 0 if nothing
    counts.

    Args:
        tokens: [B T+1].
        split: tokens of each row's prompt.
        weights: of the T targets, in any scale; those in the prompt do not matter.
        total: what the shares are taken of; None for the sum of the weights after the splits.
    """
    length = weights.shape[1]
    place = jnp.arange(length)[None] + jnp.asarray(split)[:, None]
    inside = (place < length).astype(weights.dtype)
    tokens = jnp.asarray(tokens)

    def move(x):
        # Positions past the end wrap around to the prompt; their share is zero.
        return jnp.take_along_axis(x, place % length, axis=1)

    weights = move(weights) * inside
    if total is None:
        total = jnp.sum(weights)
    # Without a target that counts the sum is 0, and 0 / tiny gives shares of 0 and no NaN.
    shares = weights / jnp.maximum(total, jnp.finfo(weights.dtype).tiny)
    return move(tokens[:, :-1]), move(tokens[:, 1:]), shares
