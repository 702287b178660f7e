"""Prompt/continuation splits; only the continuation counts in the loss.

`split` [B] is the number of prompt tokens of each row. The answers are the predictions after the
prompt: their inputs begin at position `split`, their targets one later. The prediction of the first
token after the prompt still belongs to the prompt.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import Lengths, Tokens
from rwkv7_jax.checks import (
    as_array,
    check_count,
    check_lengths,
    is_known,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.training.losses import check_ids_and_shapes, target_weights

# Separates these draws from those of a task with the same seed and step.
_STREAM = 7919


def add_prompt_splits(
    batch: BatchLike,
    seed: int,
    step: int,
    *,
    least: int = 1,
    most: int | None = None,
    first: int = 0,
) -> Batch:
    """Draws a `split` for every row, uniformly from `least` to `most` inclusive.

    Args:
        batch: tokens [B T+1], and any other fields.
        seed: of the draw, which depends only on it and the step.
        step: from 0.
        least: tokens of the shortest prompt.
        most: tokens of the longest prompt; None for T - 1, which leaves one answer.
        first: rows of the global batch before these, whose splits are drawn and discarded.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: bounds outside of 0 to T, or in the wrong order.
    """
    with prefix_errors("add_prompt_splits"):
        batch = Batch.of(batch)
        check_count(seed, 0, "`seed`")
        check_count(step, 0, "`step`")
        check_count(least, 0, "`least`")
        check_count(first, 0, "`first`")
        # The last token of a row is only a target.
        length = batch.tokens.shape[1] - 1
        # A prompt of T tokens is allowed on request, but leaves no answer.
        longest = length - 1 if most is None else check_count(most, 0, "`most`")
        if not least <= longest <= length:
            raise ValueError(
                f"`least` and `most` must be in order between 0 and {length}, "
                f"the row's inputs; got {least} and {longest}."
            )
    rows = batch.tokens.shape[0]
    # A resumed run draws the same splits.
    rng = np.random.default_rng([seed, step, _STREAM])
    # NumPy excludes the upper bound.
    split = rng.integers(least, longest + 1, first + rows)
    return batch.replace(split=split[first:].astype(np.int32))


def check_split(batch: BatchLike, vocab_size: int) -> Batch:
    """Checks that `batch` has tokens [B T+1], a mask [B T] and a split [B] that match each other.

    Raises:
        TypeError: ids or splits that are not integers.
        ValueError: a part is missing or of the wrong shape, or an id or a split is out of range.
    """
    batch = Batch.of(batch, "mask", "split")
    batch = check_ids_and_shapes(batch, vocab_size)
    rows, length = batch.tokens.shape
    check_lengths(batch["split"], (rows, length - 1), "`batch.split`")
    return batch


def count_answers(batch: Batch) -> int:
    """Counts the targets after the splits with a nonzero mask or weight."""
    counts = np.asarray(target_weights(batch))
    positions = np.arange(counts.shape[1])[None]
    return int(
        np.count_nonzero(
            (positions >= np.asarray(batch.split)[:, None]) & (counts != 0)
        )
    )


def check_answers(batch: Batch) -> None:
    """Checks that at least one target after a split counts, if masks and splits are concrete.

    Raises:
        ValueError: no target after a split counts.
    """
    counts = target_weights(batch)
    if is_known(counts) and is_known(batch["split"]) and not count_answers(batch):
        raise ValueError(
            "`batch.mask` must be nonzero for at least one target after a split; it is 0 after "
            "all of them."
        )


def after_split(split: Lengths, length: int) -> Float[Array, "B T"]:
    """Marks the targets after each row's split with 1."""
    positions = jnp.arange(length)[None]
    return (positions >= jnp.asarray(split, int)[:, None]).astype(jnp.float32)


def continuations(
    tokens: Tokens,
    split: Lengths,
    weights: Float[Array, "B C"],
    *,
    total: Float[Array, ""] | None = None,
) -> tuple[Int[Array, "B C"], Int[Array, "B C"], Float[Array, "B C"]]:
    """Moves the part after every row's split to the front: inputs, targets, shares of the loss.

    The shares are zero after the end of a row and sum to 1 over the batch; they are NaN if no
    target counts. Traced splits are not checked: those out of range leave no target.

    Args:
        tokens: [B T+1].
        split: the number of prompt tokens of each row, from 0 to T.
        weights: of the T targets, at any scale; those in the prompt are ignored.
        total: the sum by which weights are divided; None for that of the weights after the splits.

    Raises:
        TypeError: ids or splits that are not integers, or weights that are not numbers.
        ValueError: shapes that do not match each other, or a split out of range.
    """
    with prefix_errors("continuations"):
        weights = as_array(weights, "`weights`")
        Batch.of({"tokens": tokens, "weights": weights})
        split = as_array(split, "`split`")
        rows, length = weights.shape
        check_lengths(split, (rows, length), "`split`")
    weights = jnp.asarray(weights)
    split = jnp.asarray(split, int)
    positions = jnp.arange(length)[None] + split[:, None]
    inside = ((split[:, None] >= 0) & (positions < length)).astype(weights.dtype)
    tokens = jnp.asarray(tokens)

    def move(x):
        # Positions past the end wrap around; their share is zero.
        return jnp.take_along_axis(x, positions % length, axis=1)

    weights = move(weights) * inside
    if total is None:
        total = jnp.sum(weights)
    # NaN, because 0 would look like perfect answers.
    shares = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), jnp.nan)
    return move(tokens[:, :-1]), move(tokens[:, 1:]), shares
