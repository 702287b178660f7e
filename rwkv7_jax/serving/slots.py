"""The device side of serving: a batch of fixed size whose rows are assigned to requests.

The compiled programs do not depend on the requests. One program per width prefills chunks of
prompts, and one program decodes a block of all rows. Assigning a row only writes one row of the
state, so nothing is recompiled or moved.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels import platforms
from rwkv7_jax.array_types import Lengths, Params, Tokens
from rwkv7_jax.generation import sampling
from rwkv7_jax.generation.decode_loop import (
    BROKEN,
    NO_TOKEN,
    RUNNING,
    STOPPED,
    DecodeState,
    KnownTokens,
    decode,
)
from rwkv7_jax.generation.generate import commit_like
from rwkv7_jax.generation.prefill import chunk_widths, cut_chunk, prefill
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, select, stack
from rwkv7_jax.model.unrolled import split_params
from rwkv7_jax.serving.requests import MOST_ALTERNATIVES, Request, TokenScore
from rwkv7_jax.sharding import to_host
from rwkv7_jax.text.tokenizer import Tokenizer

# The number of tokens that a row decodes before the host reads them.
BLOCK = 8


class Prefill(NamedTuple):
    """The limits of one prefill program.

    Attributes:
        chunk: the maximum number of prompt tokens, over all rows.
        rows: the maximum number of prompts.
    """

    chunk: int
    rows: int


# As in `default_chunk`, the time of a CPU grows with the number of tokens, and other devices mostly
# wait for their next kernel. Here a chunk also delays the other requests.
_ON_CPU = Prefill(chunk=256, rows=1)
_ON_ACCELERATOR = Prefill(chunk=1024, rows=8)


class Drawn(NamedTuple):
    """The result of one block in one row.

    Attributes:
        tokens: the new ids, without the one that stopped the row.
        stopped: whether an end-of-text id was drawn after them.
        broken: whether the logits after them were non-finite.
        scores: the scores of the tokens, with the maximum number of alternatives; empty unless
            `decode` was called with `scored`.
    """

    tokens: list[int]
    stopped: bool
    broken: bool
    scores: list[TokenScore]


class Slots:
    """The rows of a batch that decode together, each for its own request."""

    def __init__(
        self,
        model: RWKV7,
        params: Params,
        tokenizer: Tokenizer,
        start: RWKV7State,
        *,
        slots: int,
    ):
        """Creates free rows.

        Args:
            model: the model.
            params: the weights.
            tokenizer: the tokenizer of the model; its stop ids end every row.
            start: a state of one row, with the leaves that all states have.
            slots: the number of rows (B).
        """
        self._model = model
        self._params = params
        self._layers = split_params(params)
        self._start = start
        # The options of a free row. Greedy, because that costs no random numbers.
        free = sampling.make_options(
            model.config.vocab_size,
            temperature=0.0,
            penalty_exempt=sampling.exempt_ids(tokenizer),
            stop_ids=tokenizer.stop_ids,
        )
        # On the device, so that a block need not send masks over the vocabulary.
        masks = jax.device_put((free.weights, free.banned, free.stops))
        self._free = free._replace(weights=masks[0], banned=masks[1], stops=masks[2])
        self._alternatives = min(MOST_ALTERNATIVES, model.config.vocab_size)
        is_cpu = platforms.target_platform() == "cpu"
        self._prefill = _ON_CPU if is_cpu else _ON_ACCELERATOR
        self._options = [self._free] * slots
        # The token that each new row reads before it samples: the last one of the prompt.
        self._known = np.zeros(slots, np.int32)
        self._is_new = np.zeros(slots, bool)
        self.reset()

    def reset(self) -> None:
        """Frees all rows and creates their arrays anew."""
        self._is_new[:] = False
        count = len(self._options)
        run = DecodeState.create(
            _own_rows(self._start, count),
            jnp.zeros((count, self._model.config.vocab_size), jnp.float32),
        )
        run = run._replace(status=jnp.full_like(run.status, STOPPED))
        keys = jax.random.split(jax.random.key(0), count)
        self._rows = commit_like(self._params, _Rows(run, keys))

    def options_of(self, request: Request) -> sampling.SamplingParams:
        """Checks and returns the sampling options of a request.

        Raises:
            ValueError: a number is out of range.
            TypeError: an argument has the wrong type.
        """
        options = sampling.make_options(
            self._model.config.vocab_size,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            penalty_decay=request.penalty_decay,
        )
        # All rows share the masks: thousands of requests may wait, and a mask is as long as the
        # vocabulary.
        free = self._free
        return options._replace(
            weights=free.weights, banned=free.banned, stops=free.stops
        )

    @property
    def chunk(self) -> int:
        """The maximum number of tokens of a prompt that one call of the device reads."""
        return self._prefill.chunk

    def width_of(self, count: int) -> int:
        """Returns the width of the program that reads a chunk of `count` tokens."""
        _, width = next(chunk_widths(count, self.chunk))
        return width

    def widths(self) -> set[int]:
        """Returns the widths of chunks, each of which has its own program."""
        return set(map(self.width_of, range(1, self.chunk + 1)))

    def rows_of(self, width: int) -> int:
        """Returns the number of prompts that the program of a width reads together.

        The number depends on nothing else, so that the other requests do not affect an answer.
        """
        most = min(self._prefill.rows, len(self._options))
        return max(min(most, self.chunk // width), 1)

    def read(
        self, states: Sequence[RWKV7State], chunks: Sequence[Sequence[int]]
    ) -> list[RWKV7State]:
        """Prefills states of one row with one chunk each, in one call of the device.

        Args:
            states: at most `rows_of` the chunks' width.
            chunks: all of the same width.
        """
        width = self.width_of(len(chunks[0]))
        missing = self.rows_of(width) - len(states)
        rows = [*chunks, *[()] * missing]
        tokens, lengths = cut_chunk(rows, 0, width)
        read = _prefill_together(
            self._model,
            self._params,
            [*states, *[self._start] * missing],
            tokens=tokens,
            lengths=lengths,
        )
        return read[: len(chunks)]

    def read_all(self, state: RWKV7State, tokens: Sequence[int]) -> RWKV7State:
        """Prefills one state with any number of tokens."""
        for first in range(0, len(tokens), self.chunk):
            (state,) = self.read([state], [tokens[first : first + self.chunk]])
        return state

    def take(
        self,
        slot: int,
        state: RWKV7State,
        *,
        token: int,
        seed: int,
        options: sampling.SamplingParams,
    ) -> None:
        """Assigns a row to a request, whose state has read the prompt except its last token."""
        self._options[slot] = options
        self._known[slot] = token
        self._is_new[slot] = True
        self._rows = _take(self._rows, slot, state, jax.random.key(seed))

    def free(self, slots: Bool[np.ndarray, " B"]) -> None:
        """Stops rows; the next request overwrites their content."""
        self._is_new &= ~slots
        # The sampling options of a free row should cost nothing.
        for slot in np.flatnonzero(slots):
            self._options[slot] = self._free
        self._rows = _free(self._rows, slots)

    def states(self) -> RWKV7State:
        """Returns the states of all rows, which have read all tokens that `decode` returned.

        They are invalid once a row is assigned or freed, which donates them.
        """
        return self._rows.run.state

    def decode(self, limits: Int[np.ndarray, " B"], *, scored: bool) -> list[Drawn]:
        """Decodes up to one block in every assigned row.

        Args:
            limits: the maximum number of tokens for each row, at most `BLOCK`.
            scored: whether to score the tokens, which requires sorting the vocabulary.
        """
        decoded = decode(
            self._model,
            self._layers,
            self._rows.run,
            known=KnownTokens(self._known.copy(), self._is_new.copy()),
            keys=self._rows.keys,
            options=sampling.options_by_row(self._options),
            limits=limits,
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
    """Returns the scores of the first `count` tokens of a row."""
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
    """Repeats a state of one row; each row gets its own buffer, as it is written separately."""

    def own(leaf: Array) -> Array:
        rows = jnp.broadcast_to(leaf, (leaf.shape[0], count, *leaf.shape[2:]))
        # Copy, because the rows are donated and the state must remain valid.
        return jnp.array(rows, copy=True)

    return jax.tree.map(own, state)


@functools.partial(jax.jit, static_argnums=0)
def _prefill_together(
    model: RWKV7,
    params: Params,
    states: list[RWKV7State],
    *,
    tokens: Tokens,
    lengths: Lengths,
) -> list[RWKV7State]:
    """Prefills B states of one row in one batch."""
    batch = prefill(model, params, stack(states), tokens=tokens, lengths=lengths)
    return [select(batch, row) for row in range(len(states))]


class _Rows(NamedTuple):
    """The rows on the device, and the random key of each."""

    run: DecodeState
    keys: Array


@functools.partial(jax.jit, donate_argnums=0)
def _take(rows: _Rows, slot: Int[Array, ""], state: RWKV7State, key: Array) -> _Rows:
    """Writes a state to a row and clears what the row has generated."""
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
    """Copies one row of the states of all rows."""
    return jax.tree.map(lambda leaf: leaf[:, slot][:, None], states)
