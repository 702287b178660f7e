"""How well a model predicts text, or answers, from a start state."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
from jaxtyping import Float, Int

from rwkv7_jax.array_types import Params
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, repeat
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.training.losses import token_statistics

# Borders of the ranges of positions that are reported apart.
POSITIONS = (0, 32, 128, 512, 2048, 8192)


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model loses on some text.

    Attributes:
        bits_per_byte: over all target tokens; end-of-text tokens cost bits and hold no bytes.
        perplexity: e to the mean loss per token.
        by_position: (first, behind the last, bits per byte) of ranges of positions in a window.
        tokens: targets that counted.
        standard_error: of `bits_per_byte`, over windows.
    """

    bits_per_byte: float
    perplexity: float
    by_position: tuple[tuple[int, int, float], ...]
    tokens: int
    standard_error: float


@functools.partial(jax.jit, static_argnums=0)
def _nats(model: RWKV7, params: Params, state: RWKV7State, tokens):
    x, _ = model.apply({"params": params}, tokens[:, :-1], state, method="hidden")
    return token_statistics(x, params["head"]["weight"], tokens[:, 1:]).nats


@functools.partial(jax.jit, static_argnums=0)
def _nats_and_right(model: RWKV7, params: Params, state: RWKV7State, tokens):
    """The loss of every target, and whether it is the likeliest id."""
    x, _ = model.apply({"params": params}, tokens[:, :-1], state, method="hidden")
    found = token_statistics(x, params["head"]["weight"], tokens[:, 1:])
    return found.nats, found.correct


def _by_rows(per_token, state: RWKV7State, tokens: np.ndarray, rows: int):
    """`per_token(start, piece)` over pieces of `rows` windows, all from `state`; joined."""
    start, pieces = repeat(state, rows), []
    for first in range(0, len(tokens), rows):
        piece = tokens[first : first + rows]
        full = np.concatenate([piece, np.zeros((rows - len(piece), piece.shape[1]), piece.dtype)])
        pieces.append(jax.tree.map(np.asarray, per_token(start, full)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(tokens)], *pieces)


def token_nats(
    model: RWKV7,
    params: Params,
    state: RWKV7State,
    tokens: Int[np.ndarray, "B T1"],
    *,
    rows: int = 8,
) -> Float[np.ndarray, "B T"]:
    """The loss of every target; each window is read from `state` (batch 1)."""
    return _by_rows(functools.partial(_nats, model, params), state, tokens, rows)


def score(
    model: RWKV7, params: Params, state: RWKV7State, batch: BatchLike, tokenizer: Tokenizer
) -> Score:
    """How well the model, started from `state`, predicts the windows of `batch`.

    Args:
        model: the shell around `params`.
        params: all weights.
        state: batch 1.
        batch: tokens [B T+1] and mask [B T], from `data.windows`.
        tokenizer: tells how many bytes a token stands for.
    """
    batch = Batch.of(batch, "mask", caller="score")
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    bits = token_nats(model, params, state, tokens) * mask / math.log(2)
    sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    sizes = sizes[tokens[:, 1:]] * mask

    def rate(first: int, behind: int) -> float:
        part = slice(first, behind)
        return float(bits[:, part].sum() / max(sizes[:, part].sum(), 1))

    length = bits.shape[1]
    ranges = itertools.pairwise(POSITIONS)
    by_position = tuple((a, min(b, length), rate(a, b)) for a, b in ranges if a < length)
    by_window = bits.sum(1) / np.maximum(sizes.sum(1), 1)
    return Score(
        bits_per_byte=rate(0, length),
        perplexity=float(2 ** (bits.sum() / max(mask.sum(), 1))),
        by_position=by_position,
        tokens=int(mask.sum()),
        standard_error=float(by_window.std() / math.sqrt(len(by_window))),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """How a model answers the questions of a task, each position given the right ones before it.

    Attributes:
        accuracy: share of scored positions at which the likeliest id is the right one.
        nats: mean loss of scored positions.
        exact: share of rows with all their scored positions right.
        by_position: accuracy at each position of a row; NaN where nothing is scored.
    """

    accuracy: float
    nats: float
    exact: float
    by_position: Float[np.ndarray, " T"]


def score_answers(
    model: RWKV7, params: Params, state: RWKV7State, batch: BatchLike, *, rows: int = 32
) -> Answers:
    """What the model, started from `state`, makes of a task's batch.

    Args:
        model: the shell around `params`.
        params: all weights.
        state: batch 1; every row starts from it.
        batch: tokens [B T+1] and mask [B T], from `tasks.task_batch`.
        rows: rows read at the same time.

    Raises:
        ValueError: nothing is scored.
    """
    batch = Batch.of(batch, "mask", caller="score_answers")
    tokens, scored = np.asarray(batch.tokens), np.asarray(batch.mask) > 0
    if not scored.any():
        raise ValueError("score_answers: `batch` must have a scored position; its mask is all 0.")
    nats, right = _by_rows(functools.partial(_nats_and_right, model, params), state, tokens, rows)
    count = scored.sum(0)
    by_position = np.where(count, (right & scored).sum(0) / np.maximum(count, 1), np.nan)
    asked = scored.any(1)
    return Answers(
        accuracy=float(right[scored].mean()),
        nats=float(nats[scored].mean()),
        exact=float((right | ~scored)[asked].all(1).mean()),
        by_position=by_position,
    )
