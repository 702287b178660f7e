"""Measures how well a model predicts text, or answers questions, from a start state."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import (
    as_array,
    check_count,
    check_runnable,
    check_tokenizer,
    check_tokens,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.evaluation.ratio import Ratio
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, check_state, repeat
from rwkv7_jax.sharding import filled_rows, mesh_sizes, to_host
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.training.head_loss import TokenStatistics, token_statistics
from rwkv7_jax.training.losses import check_masked_batch

# Borders of the position ranges that are reported separately; the last range has no end.
POSITIONS = (0, 32, 128, 512, 2048, 8192)


def _no_parts() -> Ratio:
    return Ratio(np.zeros(0), np.zeros(0))


@dataclasses.dataclass(frozen=True)
class Score:
    """The loss of a model on some text.

    Attributes:
        bits_per_byte: bits per byte over all targets that count. An end-of-text token costs bits
            and has no bytes; NaN if only such tokens count.
        perplexity: e to the mean loss per token.
        by_position: (first, end, bits per byte) of ranges of positions in a window; NaN if no byte
            counts.
        tokens: number of targets that count.
        standard_error: standard error of `bits_per_byte`, over windows, because the targets of one
            window depend on each other; NaN for a single window.
        by_window: bits and bytes of each window in which a target counts.
    """

    bits_per_byte: float
    perplexity: float
    by_position: tuple[tuple[int, int, float], ...]
    tokens: int
    standard_error: float
    by_window: Ratio = dataclasses.field(
        default_factory=_no_parts, compare=False, repr=False
    )

    def difference(self, base: "Score") -> tuple[float, float]:
        """Returns the bits per byte minus those of `base`, and the standard error over pairs.

        Args:
            base: score of another state or model on the same windows.

        Raises:
            ValueError: `base` covers other windows.
        """
        with prefix_errors("Score.difference"):
            return self.by_window.difference(base.by_window)


def _statistics(
    model: RWKV7,
    params: Params,
    state: RWKV7State,
    tokens: Int[Array | np.ndarray, "B T1"],
) -> TokenStatistics:
    """Computes statistics of the targets; XLA removes those that a caller does not use."""
    x, _ = model.apply({"params": params}, tokens[:, :-1], state, method="hidden")
    return token_statistics(x, params["head"]["weight"], tokens[:, 1:])


@functools.partial(jax.jit, static_argnums=0)
def _nats(model: RWKV7, *arguments: Any) -> Any:
    """Computes the loss of each target."""
    return _statistics(model, *arguments).nats


@functools.partial(jax.jit, static_argnums=0)
def _nats_and_correct(model: RWKV7, *arguments: Any) -> tuple[Any, Any]:
    """Computes the loss of each target, and whether it is the most likely id."""
    statistics = _statistics(model, *arguments)
    return statistics.nats, statistics.correct


def map_rows(
    per_token: Callable[..., Any], state: RWKV7State, tokens: np.ndarray, rows: int
) -> Any:
    """Calls `per_token(start, tokens)` on some windows at a time and joins the results.

    Args:
        per_token: a compiled function.
        state: batch 1; every window starts from it.
        tokens: tokens of all windows.
        rows: windows per call; more if devices share them.
    """
    rows = filled_rows(rows, mesh_sizes())
    # Broadcast once: every call starts from the same arrays.
    start = repeat(state, rows)
    results = []
    for first in range(0, len(tokens), rows):
        part = tokens[first : first + rows]
        # Padding to one shape lets one program serve all calls.
        missing = np.zeros((rows - len(part), part.shape[1]), part.dtype)
        result = per_token(start, np.concatenate([part, missing]))
        results.append(to_host(result))

    def join(*leaves: np.ndarray) -> np.ndarray:
        return np.concatenate(leaves)[: len(tokens)]

    return jax.tree.map(join, *results)


def token_nats(
    model: RWKV7,
    params: Params,
    state: RWKV7State,
    tokens: Int[np.ndarray, "B T1"],
    *,
    rows: int = 8,
) -> Float[np.ndarray, "B T"]:
    """Computes the loss of each target; each window starts from the same state.

    Args:
        model: the network.
        params: all weights.
        state: batch 1.
        tokens: tokens of the windows.
        rows: windows per batch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the weights or the state do not fit the model, an id is out of range, or `rows`
            is below 1.
    """
    with prefix_errors("token_nats"):
        check_start(model, params, state)
        tokens = np.asarray(as_array(tokens, "`tokens`"))
        if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
            raise ValueError(
                f"`tokens` must be rows of at least two ids; got shape {tokens.shape}."
            )
        check_tokens(tokens, model.config.vocab_size)
        check_count(rows, 1, "`rows`")
    return map_rows(functools.partial(_nats, model, params), state, tokens, rows)


def check_start(model: RWKV7, params: Params, state: RWKV7State) -> None:
    """Raises unless the weights and the state fit the model, and the state has batch 1."""
    check_runnable(model, params)
    check_state(state, 1, model.config)


# A World vocabulary has 65,536 entries, and a run evaluates many times. Cached by id, because a
# vocabulary may have billions of ids.
@functools.lru_cache(maxsize=2**17)
def _token_size(tokenizer: Tokenizer, token: int) -> int:
    """Returns the number of bytes of an id."""
    return len(tokenizer.token_bytes(token))


def target_bytes(batch: Batch, tokenizer: Tokenizer) -> Float[np.ndarray, "B T"]:
    """Returns the number of bytes of each target, times the batch's mask."""
    targets = np.asarray(batch.targets)
    kinds, places = np.unique(targets, return_inverse=True)
    sizes = np.array([_token_size(tokenizer, kind) for kind in kinds.tolist()])
    return sizes[places].reshape(targets.shape) * np.asarray(batch.mask)


def frequency_nats(batch: Batch) -> float:
    """Computes the mean loss of predicting each target by its frequency in the batch.

    No model that ignores its context does better on these rows.

    Args:
        batch: batch with a mask, in which at least one target counts.
    """
    targets = np.asarray(batch.targets)
    _, kinds = np.unique(targets, return_inverse=True)
    counts = np.bincount(kinds.ravel(), weights=np.asarray(batch.mask).ravel())
    shares = counts[counts > 0] / counts.sum()
    return float(-np.sum(shares * np.log(shares)))


def score(
    model: RWKV7,
    params: Params,
    state: RWKV7State,
    batch: BatchLike,
    tokenizer: Tokenizer,
) -> Score:
    """Measures how well the model, started from `state`, predicts the windows of `batch`.

    Args:
        model: the network.
        params: all weights.
        state: batch 1.
        batch: tokens [B T+1] and mask [B T], from `data.windows`.
        tokenizer: provides the number of bytes of each token.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: no target counts, the batch, the state or the weights do not fit the model, or
            an id is out of range.
    """
    with prefix_errors("score"):
        check_start(model, params, state)
        batch = check_masked_batch(batch, model.config.vocab_size)
        check_tokenizer(tokenizer, "token_bytes", "vocab_size")
    tokens = np.asarray(batch.tokens)
    largest = int(tokens.max())
    if largest >= tokenizer.vocab_size:
        raise ValueError(
            f"score: `batch` must hold ids below the vocabulary size of `tokenizer`, "
            f"{tokenizer.vocab_size}; got {largest}."
        )
    mask = np.asarray(batch.mask)
    bits = token_nats(model, params, state, tokens) * mask / math.log(2)
    sizes = target_bytes(batch, tokenizer)
    length = bits.shape[1]
    by_position = []
    borders = [border for border in POSITIONS if border < length]
    for first, end in itertools.pairwise([*borders, length]):
        found = _by_window(bits[:, first:end], sizes[:, first:end])
        by_position.append((first, end, found.value))
    # A window in which nothing counts is not an observation.
    counts = mask.any(1)
    by_window = _by_window(bits[counts], sizes[counts])
    return Score(
        bits_per_byte=by_window.value,
        perplexity=float(2 ** (bits.sum() / mask.sum())),
        by_position=tuple(by_position),
        tokens=int(np.count_nonzero(mask)),
        standard_error=by_window.standard_error,
        by_window=by_window,
    )


def _by_window(
    bits: Float[np.ndarray, "B T"], sizes: Float[np.ndarray, "B T"]
) -> Ratio:
    """Sums the bits and the bytes of each window."""
    return Ratio(bits.sum(1, dtype=np.float64), sizes.sum(1, dtype=np.float64))


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """The accuracy of a model on a task; each position is given the correct ids before it.

    Attributes:
        accuracy: fraction of scored positions at which the most likely id is correct.
        nats: mean loss of scored positions.
        exact: fraction of rows that are correct at all their scored positions.
        by_position: accuracy at each position of a row; NaN if nothing is scored there.
        by_row: correct answers and scored positions of each row with a scored position.
    """

    accuracy: float
    nats: float
    exact: float
    by_position: Float[np.ndarray, " T"]
    by_row: Ratio = dataclasses.field(default_factory=_no_parts, repr=False)

    @property
    def standard_error(self) -> float:
        """The standard error of `accuracy` over rows; NaN for a single row."""
        return self.by_row.standard_error

    def difference(self, base: "Answers") -> tuple[float, float]:
        """Returns the accuracy minus that of `base`, and the standard error over pairs of rows.

        Args:
            base: answers of another state or model on the same rows.

        Raises:
            ValueError: `base` covers other rows.
        """
        with prefix_errors("Answers.difference"):
            return self.by_row.difference(base.by_row)


def score_answers(
    model: RWKV7, params: Params, state: RWKV7State, batch: BatchLike, *, rows: int = 32
) -> Answers:
    """Measures how well the model, started from `state`, answers the rows of a task.

    Args:
        model: the network.
        params: all weights.
        state: batch 1; every row starts from it.
        batch: tokens [B T+1] and mask [B T], from `synthetic_tasks.task_batch`.
        rows: rows per batch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: nothing is scored, the weights or the state do not fit the model, an id is out
            of range, or `rows` is below 1.
    """
    with prefix_errors("score_answers"):
        check_start(model, params, state)
        batch = check_masked_batch(batch, model.config.vocab_size)
        check_count(rows, 1, "`rows`")
    tokens = np.asarray(batch.tokens)
    scored = np.asarray(batch.mask) > 0
    per_token = functools.partial(_nats_and_correct, model, params)
    nats, correct = map_rows(per_token, state, tokens, rows)
    right = correct & scored
    count = scored.sum(0)
    rows_with_answers = scored.any(1)
    by_row = Ratio(
        right.sum(1)[rows_with_answers].astype(np.float64),
        scored.sum(1)[rows_with_answers].astype(np.float64),
    )
    all_right = (correct | ~scored).all(1)
    return Answers(
        accuracy=float(correct[scored].mean()),
        nats=float(nats[scored].mean()),
        exact=float(all_right[rows_with_answers].mean()),
        by_position=np.where(count, right.sum(0) / np.maximum(count, 1), np.nan),
        by_row=by_row,
    )
