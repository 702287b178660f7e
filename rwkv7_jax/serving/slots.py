"""The device's side of serving: a batch of fixed size whose rows are given to requests.

Whatever is served, the programs are the same: some read a chunk of one prompt, each of one width,
and one decodes a block of all rows. A row is taken by writing one row of the state, so nothing is
compiled or moved for it.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from rwkv7_jax.array_types import Params
from rwkv7_jax.generation import sampling
from rwkv7_jax.generation.decode_loop import (
    BROKEN,
    NO_TOKEN,
    RUNNING,
    STOPPED,
    DecodeState,
    KnownTokens,
    chunk_widths,
    decode,
    prefill_rows,
)
from rwkv7_jax.generation.generate import commit_like
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.model.unrolled import split_params
from rwkv7_jax.serving.requests import MOST_ALTERNATIVES, TokenScore
from rwkv7_jax.sharding import to_host
from rwkv7_jax.text.tokenizer import Tokenizer

# Tokens that a row draws between two looks of the host.
BLOCK = 8

# Tokens of a prompt that are read at once.
CHUNK = 256


class Drawn(NamedTuple):
    """What one block gave a row.

    Attributes:
        tokens: new ids, without the one that stopped the row.
        stopped: an id that ends a text was drawn after them.
        broken: the logits after them were not finite.
        scores: of the tokens, with as many alternatives as a request may ask for; none where they
            were not asked for.
    """

    tokens: list[int]
    stopped: bool
    broken: bool
    scores: list[TokenScore]


def free_options(model: RWKV7, tokenizer: Tokenizer) -> sampling.SamplingParams:
    """Makes the sampling options of a free row; its token masks apply to all rows."""
    # Greedy, so that it costs no draws.
    return sampling.make_options(
        model.config.vocab_size,
        temperature=0.0,
        penalty_exempt=sampling.exempt_ids(tokenizer),
        stop_ids=tokenizer.stop_ids,
    )


class Slots:
    """Rows of a batch that decode together, each for a request of its own."""

    def __init__(
        self,
        model: RWKV7,
        params: Params,
        start: RWKV7State,
        *,
        slots: int,
        free: sampling.SamplingParams,
    ):
        """Makes free rows.

        Args:
            model: static.
            params: the weights.
            start: a state of one row, with the leaves that all have.
            slots: rows (B).
            free: options of a row that nobody has taken; the ids in them count for all rows.
        """
        self._model = model
        self._params = params
        self._layers = split_params(params)
        self._start = start
        self._free = free
        self._alternatives = min(MOST_ALTERNATIVES, model.config.vocab_size)
        self._options = [free] * slots
        # Tokens that rows read before they draw: the last one of a prompt.
        self._known = np.zeros(slots, np.int32)
        self._is_new = np.zeros(slots, bool)
        self.reset()

    def reset(self) -> None:
        """Makes all rows free and new."""
        self._is_new[:] = False
        count = len(self._options)
        run = DecodeState.create(
            _own_rows(self._start, count),
            jnp.zeros((count, self._model.config.vocab_size), jnp.float32),
        )
        run = run._replace(status=jnp.full_like(run.status, STOPPED))
        keys = jax.random.split(jax.random.key(0), count)
        self._rows = commit_like(self._params, _Rows(run, keys))

    def widths(self) -> set[int]:
        """Returns the widths of chunks, each of which is a program."""
        chunks = (next(chunk_widths(total, CHUNK)) for total in range(1, CHUNK + 1))
        return {width for _, width in chunks}

    def read(self, state: RWKV7State, tokens: Sequence[int]) -> RWKV7State:
        """Reads tokens into the state of one row, at most a chunk at once."""
        return prefill_rows(self._model, self._params, state, [tokens], chunk=CHUNK)

    def take(
        self,
        slot: int,
        state: RWKV7State,
        *,
        token: int,
        seed: int,
        options: sampling.SamplingParams,
    ) -> None:
        """Gives a row to a request whose prompt was read but for its last token."""
        self._options[slot] = options
        self._known[slot] = token
        self._is_new[slot] = True
        self._rows = _take(self._rows, slot, state, jax.random.key(seed))

    def free(self, slots: Bool[np.ndarray, " B"]) -> None:
        """Stops rows; what is left in them is overwritten by the next request."""
        self._is_new &= ~slots
        # A row that is free draws nothing, and its choices should cost nothing.
        for slot in np.flatnonzero(slots):
            self._options[slot] = self._free
        self._rows = _free(self._rows, slots)

    def states(self) -> RWKV7State:
        """Returns the states of all rows, which have read all tokens that `decode` returned.

        They are gone once a row is taken or freed.
        """
        return self._rows.run.state

    def decode(self, limits: Int[np.ndarray, " B"], *, scored: bool) -> list[Drawn]:
        """Draws up to a block in every row that is taken; others draw nothing.

        Args:
            limits: tokens that each row draws at most.
            scored: whether to score the tokens, which takes a sort of the vocabulary.
        """
        decoded = decode(
            self._model,
            self._layers,
            self._rows.run,
            known=KnownTokens(self._known.copy(), self._is_new.copy()),
            keys=self._rows.keys,
            options=sampling.options_by_row(self._options),
            limits=np.minimum(limits, BLOCK),
            capacity=BLOCK,
            alternatives=self._alternatives,
            scored=scored,
        )
        self._is_new[:] = False
        self._rows = self._rows._replace(run=decoded.run)
        tokens, lengths, status, scores = to_host(
            (decoded.tokens, decoded.lengths, decoded.run.status, decoded.scores)
        )
        drawn = []
        for row, count in enumerate(lengths.tolist()):
            one = Drawn(
                tokens[row, :count].tolist(),
                stopped=status[row] == STOPPED,
                broken=status[row] == BROKEN,
                scores=_token_scores(tokens, scores, row, count) if scored else [],
            )
            drawn.append(one)
        return drawn


def _token_scores(
    tokens: np.ndarray, scores: sampling.ModelScores, row: int, count: int
) -> list[TokenScore]:
    """Returns the scores of a row's first tokens."""
    found = []
    for at in range(count):
        ids = scores.ids[row, at].tolist()
        logps = scores.logps[row, at].tolist()
        score = TokenScore(
            id=int(tokens[row, at]),
            logp=float(scores.drawn[row, at]),
            alternatives=tuple(zip(ids, logps, strict=True)),
        )
        found.append(score)
    return found


def _own_rows(state: RWKV7State, count: int) -> RWKV7State:
    """Makes rows of a state of one row that share nothing: each will be written by itself."""

    def own(leaf: Array) -> Array:
        rows = jnp.broadcast_to(leaf, (leaf.shape[0], count, *leaf.shape[2:]))
        # The rows are donated, and the state stays.
        return jnp.array(rows, copy=True)

    return jax.tree.map(own, state)


class _Rows(NamedTuple):
    """The rows on the device, and the key of each."""

    run: DecodeState
    keys: Array


@functools.partial(jax.jit, donate_argnums=0)
def _take(rows: _Rows, slot: Int[Array, ""], state: RWKV7State, key: Array) -> _Rows:
    """Writes a state into a row, and forgets what the row generated."""
    run = rows.run
    occurrences = jax.tree.map(
        lambda leaf: leaf.at[slot].set(jnp.zeros((), leaf.dtype)), run.occurrences
    )
    taken = run._replace(
        state=jax.tree.map(
            lambda leaf, one: leaf.at[:, slot].set(one[:, 0]), run.state, state
        ),
        status=run.status.at[slot].set(RUNNING),
        stop_tokens=run.stop_tokens.at[slot].set(NO_TOKEN),
        occurrences=occurrences,
        step=run.step.at[slot].set(0),
    )
    return _Rows(taken, rows.keys.at[slot].set(key))


@functools.partial(jax.jit, donate_argnums=0)
def _free(rows: _Rows, slots: Bool[Array, " B"]) -> _Rows:
    status = jnp.where(slots, STOPPED, rows.run.status)
    return rows._replace(run=rows.run._replace(status=status))


@jax.jit
def row_state(states: RWKV7State, slot: Int[Array, ""]) -> RWKV7State:
    """Copies one row of the states of all."""
    return jax.tree.map(lambda leaf: leaf[:, slot][:, None], states)
