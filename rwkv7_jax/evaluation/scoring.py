"""How well a model predicts text, or answers, from a start state."""

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
    check_model,
    check_params,
    check_placed,
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

# Borders of the ranges of positions that are reported apart.
POSITIONS = (0, 32, 128, 512, 2048, 8192)


def _no_parts() -> Ratio:
    return Ratio(np.zeros(0), np.zeros(0))


@dataclasses.dataclass(frozen=True)
class Score:
    """The loss of a model on some text.

    Attributes:
        bits_per_byte: over all targets that count; an end-of-text token costs bits and has no
            bytes. NaN where only such tokens count.
        perplexity: e to the mean loss per token.
        by_position: (first, end, bits per byte) of ranges of positions in a window; NaN where no
            byte counts.
        tokens: targets that count.
        standard_error: of `bits_per_byte`, over windows, since the targets of one window depend on
            each other; NaN of a single window.
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
        """Returns the bits per byte less those of `base`, and the standard error over pairs.

        Args:
            base: of the same windows, by another state or model.

        Raises:
            ValueError: `base` is of other windows.
        """
        with prefix_errors("Score.difference"):
            return self.by_window.difference(base.by_window)


def _statistics(
    model: RWKV7,
    params: Params,
    state: RWKV7State,
    tokens: Int[Array | np.ndarray, "B T1"],
) -> TokenStatistics:
    """Reads the tokens from the state; XLA removes the statistics that a caller does not use."""
    x, _ = model.apply({"params": params}, tokens[:, :-1], state, method="hidden")
    return token_statistics(x, params["head"]["weight"], tokens[:, 1:])


@functools.partial(jax.jit, static_argnums=0)
def _nats(model: RWKV7, *arguments: Any) -> Any:
    """Computes the loss of each target."""
    return _statistics(model, *arguments).nats


@functools.partial(jax.jit, static_argnums=0)
def _nats_and_correct(model: RWKV7, *arguments: Any) -> tuple[Any, Any]:
    """Computes the loss of each target, and whether it is the likeliest id."""
    statistics = _statistics(model, *arguments)
    return statistics.nats, statistics.correct


def map_rows(
    per_token: Callable[..., Any], state: RWKV7State, tokens: np.ndarray, rows: int
) -> Any:
    """Calls `per_token(start, tokens)` on some windows at a time and joins the results.

    Args:
        per_token: a compiled function.
        state: batch 1; every window starts from it.
        tokens: of all windows.
        rows: windows that are read at the same time; more where devices share them.
    """
    rows = filled_rows(rows, mesh_sizes())
    # Broadcast once: every part of the rows starts from the same arrays.
    start = repeat(state, rows)
    results = []
    for first in range(0, len(tokens), rows):
        part = tokens[first : first + rows]
        # Filled up to the same shape, so that the program is compiled once.
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
    """Computes the loss of each target, with each window read from the same state.

    Args:
        model: the shell around `params`.
        params: all weights.
        state: batch 1.
        tokens: of the windows.
        rows: windows that are read at the same time.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: weights or a state of another model, ids out of range, or rows below 1.
    """
    with prefix_errors("token_nats"):
        check_start(model, params, state)
        tokens = np.asarray(as_array(tokens, "`tokens`"))
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ValueError(
                f"`tokens` must be rows of two ids or more; got shape {tokens.shape}."
            )
        check_tokens(tokens, model.config.vocab_size)
        check_count(rows, 1, "`rows`")
    return map_rows(functools.partial(_nats, model, params), state, tokens, rows)


def check_start(model: RWKV7, params: Params, state: RWKV7State) -> None:
    """Raises unless weights and a start state of one sequence are the model's."""
    check_model(model)
    check_params(params, model.config)
    check_placed(params, "`params`")
    check_state(state, 1, model.config)


# By tokenizer: a World vocabulary has 65,536 entries, and a run evaluates many times.
@functools.lru_cache(maxsize=4)
def _token_sizes(tokenizer: Tokenizer) -> Int[np.ndarray, " V"]:
    """Returns the number of bytes of each id."""
    return np.array(
        [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    )


def target_bytes(batch: Batch, tokenizer: Tokenizer) -> Float[np.ndarray, "B T"]:
    """Returns the bytes of each target of a batch with a mask, times the mask."""
    targets = np.asarray(batch.targets)
    return _token_sizes(tokenizer)[targets] * np.asarray(batch.mask)


def frequency_nats(batch: Batch) -> float:
    """Computes the mean loss of guessing each target by how often it is one in the batch.

    No model that ignores what it has read does better on these rows.

    Args:
        batch: with a mask that counts a target.
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
        model: the shell around `params`.
        params: all weights.
        state: batch 1.
        batch: tokens [B T+1] and mask [B T], from `data.windows`.
        tokenizer: tells how many bytes a token has.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: no target counts, a batch, a state or weights of another model, or ids out of
            range.
    """
    with prefix_errors("score"):
        check_start(model, params, state)
        batch = check_masked_batch(batch, model.config.vocab_size)
        if not (hasattr(tokenizer, "token_bytes") and hasattr(tokenizer, "vocab_size")):
            raise TypeError(
                f"`tokenizer` must be a Tokenizer; got {type(tokenizer).__name__}."
            )
    tokens = np.asarray(batch.tokens)
    largest = int(tokens.max())
    if largest >= tokenizer.vocab_size:
        raise ValueError(
            f"score: `batch` must hold ids below the {tokenizer.vocab_size} of `tokenizer`; "
            f"got {largest}."
        )
    # [B T], 0 where a target does not count.
    mask = np.asarray(batch.mask)
    bits = token_nats(model, params, state, tokens) * mask / math.log(2)
    sizes = target_bytes(batch, tokenizer)
    length = bits.shape[1]
    by_position = []
    for first, end in itertools.pairwise(POSITIONS):
        if first < length:
            end = min(end, length)
            found = _by_window(bits[:, first:end], sizes[:, first:end])
            by_position.append((first, end, found.value))
    # Windows in which nothing counts are no observations.
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
    """How a model answers the questions of a task, each position given the right ones before it.

    Attributes:
        accuracy: share of scored positions at which the likeliest id is the right one.
        nats: mean loss of scored positions.
        exact: share of rows that are right at all their scored positions.
        by_position: accuracy at each position of a row; NaN where nothing is scored.
        by_row: right answers and scored positions of each row that has any.
    """

    accuracy: float
    nats: float
    exact: float
    by_position: Float[np.ndarray, " T"]
    by_row: Ratio = dataclasses.field(default_factory=_no_parts, repr=False)

    @property
    def standard_error(self) -> float:
        """Of `accuracy`, over rows; NaN of a single one."""
        return self.by_row.standard_error

    def difference(self, base: "Answers") -> tuple[float, float]:
        """Returns the accuracy less that of `base`, and the standard error over pairs of rows.

        Args:
            base: of the same rows, by another state or model.

        Raises:
            ValueError: `base` is of other rows.
        """
        with prefix_errors("Answers.difference"):
            return self.by_row.difference(base.by_row)


def score_answers(
    model: RWKV7, params: Params, state: RWKV7State, batch: BatchLike, *, rows: int = 32
) -> Answers:
    """Measures how the model, started from `state`, answers the rows of a task.

    Args:
        model: the shell around `params`.
        params: all weights.
        state: batch 1; every row starts from it.
        batch: tokens [B T+1] and mask [B T], from `synthetic_tasks.task_batch`.
        rows: rows that are read at the same time.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: nothing is scored, weights or a state of another model, ids out of range, or
            rows below 1.
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
    # Positions that are not scored cannot be wrong.
    all_right = (correct | ~scored).all(1)
    return Answers(
        accuracy=float(correct[scored].mean()),
        nats=float(nats[scored].mean()),
        exact=float(all_right[rows_with_answers].mean()),
        by_position=np.where(count, right.sum(0) / np.maximum(count, 1), np.nan),
        by_row=by_row,
    )
