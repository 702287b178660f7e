"""How well a model predicts text from a start state. Level 6."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
from jaxtyping import Float, Int

from .loss import cross_entropy
from .model import RWKV7
from .shapes import Params
from .state import RWKV7State, init_state, repeat
from .tokenizer import Tokenizer

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
    return cross_entropy(x, params["head"]["weight"], tokens[:, 1:])[0]


def token_nats(
    model: RWKV7,
    params: Params,
    state: RWKV7State,
    tokens: Int[np.ndarray, "B T1"],
    *,
    rows: int = 8,
) -> Float[np.ndarray, "B T"]:
    """The loss of every target; each window is read from `state` (batch 1)."""
    start, pieces = repeat(state, rows), []
    for first in range(0, len(tokens), rows):
        piece = tokens[first : first + rows]
        full = np.concatenate([piece, np.zeros((rows - len(piece), piece.shape[1]), piece.dtype)])
        pieces.append(np.asarray(_nats(model, params, start, full))[: len(piece)])
    return np.concatenate(pieces)


def score(
    model: RWKV7, params: Params, state: RWKV7State, batch: dict, tokenizer: Tokenizer
) -> Score:
    """How well the model, started from `state`, predicts the windows of `batch`.

    Args:
        model: the shell around `params`.
        params: all weights.
        state: batch 1.
        batch: tokens [B T+1] and mask [B T], from `data.windows`.
        tokenizer: tells how many bytes a token stands for.
    """
    tokens, mask = np.asarray(batch["tokens"]), np.asarray(batch["mask"])
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


@functools.partial(jax.jit, static_argnums=0)
def _read(model: RWKV7, params: Params, state: RWKV7State, tokens):
    return model.apply({"params": params}, tokens, state, method="hidden")[1]


def state_after(
    model: RWKV7, params: Params, tokens: Int[np.ndarray, " T"], *, chunk: int = 1024
) -> RWKV7State:
    """The state (batch 1) behind a prompt of any length, read in pieces from the zero state."""
    state = init_state(model.config)
    whole = len(tokens) // chunk * chunk
    for piece in [*np.split(tokens[:whole], max(whole // chunk, 1)), tokens[whole:]]:
        if len(piece):
            state = _read(model, params, state, np.asarray(piece, np.int32)[None])
    return state
