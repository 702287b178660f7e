"""Prompt/continuation splits; only the continuation counts in the loss.

`split` [B] counts the tokens of each row's prompt. The answers are the predictions of a model that
reads on from there: inputs from position `split` on, their targets one later. The prediction of the
first token after the prompt still belongs to the prompt.
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
from rwkv7_jax.training.losses import check_ids_and_shapes

# Keeps these draws apart from those that a task makes of the same seed and step.
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
    """Draws a `split` for every row, uniformly from `least` to `most`, both included.

    Args:
        batch: tokens [B T+1], and any other fields.
        seed: the draw depends on it and the step alone.
        step: from 0.
        least: tokens of the shortest prompt.
        most: tokens of the longest; None for T - 1, which leaves one answer.
        first: rows of the global batch before these; their splits are drawn and left out.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: bounds outside of 0 to T, or in the wrong order.
    """
    with prefix_errors("add_prompt_splits"):
        batch = Batch.of(batch)
        check_count(seed, 0, "`seed`")
        check_count(step, 0, "`step`")
        check_count(least, 0, "`least`")
        check_count(first, 0, "`first`")
        # The last id of a row is only a target.
        length = batch.tokens.shape[1] - 1
        # A prompt of T tokens is allowed on request, but leaves no answer.
        longest = length - 1 if most is None else check_count(most, 0, "`most`")
        if not least <= longest <= length:
            raise ValueError(
                f"`least` and `most` must be in order between 0 and {length}, "
                f"the row's inputs; got {least} and {longest}."
            )
    rows = batch.tokens.shape[0]
    # From seed and step alone, so that a resumed run draws the same splits.
    rng = np.random.default_rng([seed, step, _STREAM])
    # NumPy leaves the upper bound out.
    split = rng.integers(least, longest + 1, first + rows)
    return batch.replace(split=split[first:].astype(np.int32))


def check_split(batch: BatchLike, vocab_size: int) -> Batch:
    """Checks that `batch` has tokens [B T+1], a mask [B T] and a split [B] that fit each other.

    Raises:
        TypeError: ids or splits that are not integers.
        ValueError: a part is missing or misshapen, or an id or a split is out of range.
    """
    Batch.of(batch, "mask", "split")
    batch = check_ids_and_shapes(batch, vocab_size)
    rows, length = batch.tokens.shape
    check_lengths(batch["split"], (rows, length - 1), name="batch.split")
    return batch


def count_answers(batch: Batch) -> int:
    """Counts the targets after the splits that count in the loss."""
    counts = np.asarray(batch.mask if batch.weights is None else batch.weights)
    positions = np.arange(counts.shape[1])[None]
    return int(
        np.count_nonzero(
            (positions >= np.asarray(batch.split)[:, None]) & (counts != 0)
        )
    )


def check_answers(batch: Batch) -> None:
    """Checks that a target after a split counts, where masks and splits can be read here.

    Raises:
        ValueError: none does.
    """
    counts = batch.mask if batch.weights is None else batch.weights
    if is_known(counts) and is_known(batch["split"]) and not count_answers(batch):
        raise ValueError(
            "`batch.mask` must count a target after a split; it is 0 after all of them, and a "
            "mean over nothing is no number."
        )


def after_split(split: Lengths, length: int) -> Float[Array, "B T"]:
    """Marks the targets after each row's split with 1."""
    positions = jnp.arange(length)[None]
    return (positions >= jnp.asarray(split)[:, None]).astype(jnp.float32)


def continuations(
    tokens: Tokens,
    split: Lengths,
    weights: Float[Array, "B C"],
    *,
    total: Float[Array, ""] | None = None,
) -> tuple[Int[Array, "B C"], Int[Array, "B C"], Float[Array, "B C"]]:
    """Moves the part after every row's split to the front: inputs, targets, shares of the loss.

    The shares are zero after the end of a row and add up to 1 over the batch; they are NaN if
    nothing counts. Traced splits cannot be checked: those out of range leave no target.

    Args:
        tokens: [B T+1].
        split: tokens of each row's prompt, from 0 to T.
        weights: of the T targets, in any scale; those in the prompt do not matter.
        total: what the shares are taken of; None for the sum of the weights after the splits.

    Raises:
        TypeError: ids or splits that are not integers, or weights that are no numbers.
        ValueError: shapes that do not fit each other, or a split out of range.
    """
    with prefix_errors("continuations"):
        weights = as_array(weights, "`weights`")
        Batch.of({"tokens": tokens, "weights": weights})
        split = as_array(split, "`split`")
        rows, length = weights.shape
        check_lengths(split, (rows, length), name="split")
    weights = jnp.asarray(weights)
    split = jnp.asarray(split)
    positions = jnp.arange(length)[None] + split[:, None]
    inside = ((split[:, None] >= 0) & (positions < length)).astype(weights.dtype)
    tokens = jnp.asarray(tokens)

    def move(x):
        # Positions past the end wrap around to the prompt; their share is zero.
        return jnp.take_along_axis(x, positions % length, axis=1)

    weights = move(weights) * inside
    if total is None:
        total = jnp.sum(weights)
    # NaN and not 0, which would look like perfect answers.
    shares = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), jnp.nan)
    return move(tokens[:, :-1]), move(tokens[:, 1:]), shares
