"""Compiled programs that read and generate tokens on the device, and the state they carry.

The model is any module with RWKV-7's calls, a static argument; weights are ordinary arguments.
Programs depend on the batch, on a width and on nothing else: limits, temperatures and masks are
traced.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rwkv7_jax.array_types import Lengths, Params, Tokens
from rwkv7_jax.generation import sampling
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import RWKV7State, restore_rows
from rwkv7_jax.model.unrolled import join_states, read_token, split_params, split_state

# Values of `DecodeState.status`.
RUNNING = 0
STOPPED = 1
BROKEN = 2

# Stands in `DecodeState.stop_tokens` where no stop id was drawn; an array cannot hold None.
NO_TOKEN = -1

# Width of the narrowest program that reads known tokens; wider ones are powers of two.
_NARROWEST = 16

# The narrowest buffer of generated tokens.
_SMALLEST_BLOCK = 8


class KnownTokens(NamedTuple):
    """A token that each row reads instead of one that it generates.

    Attributes:
        tokens: [B].
        live: [B], rows that read theirs.
    """

    tokens: Array | np.ndarray
    live: Array | np.ndarray


class DecodeState(NamedTuple):
    """A batch in the middle of generating.

    Attributes:
        state: memory that has read every token that was kept; inside of `decode` one entry a layer.
        logits: [B V] float32, for the token that comes next.
        status: [B], RUNNING, STOPPED, or BROKEN when the logits held a NaN or an infinity.
        stop_tokens: [B] int32, the stop id that ended the row, or NO_TOKEN.
        occurrences: ids generated so far, for the penalties.
        step: [B] int32, tokens generated so far.
    """

    state: Any
    logits: Array
    status: Array
    stop_tokens: Array
    occurrences: sampling.Occurrences
    step: Array

    @classmethod
    def create(cls, state: RWKV7State, logits: Float[Array, "B V"]) -> "DecodeState":
        """Starts every row with no token generated."""
        batch = logits.shape[0]
        return cls(
            state=state,
            logits=logits,
            status=jnp.full(batch, RUNNING, jnp.int32),
            stop_tokens=jnp.full(batch, NO_TOKEN, jnp.int32),
            occurrences=sampling.no_occurrences(*logits.shape),
            step=jnp.zeros(batch, jnp.int32),
        )

    def advance(
        self,
        config: RWKV7Config,
        params: Params,
        *,
        known: KnownTokens,
        is_known: Bool[Array, ""],
        paused: Bool[Array, " B"],
        keys: Array,
        options: sampling.SamplingParams,
    ) -> tuple["DecodeState", Int[Array, " B"], Float[Array, " B"], Bool[Array, " B"]]:
        """Reads one token a row, sampled or known; `state` is that of `split_state` here.

        A row that stops here keeps the state and the logits it had. Known tokens stop no row and
        count for no penalty. Paused rows draw nothing.

        Returns:
            The next state, the tokens, the log-probabilities of sampled ones, and which rows have
            read theirs.
        """
        logits = sampling.apply_penalties(self.logits, self.occurrences, options)
        # By the step and not by splitting: a row's draws do not depend on the length of a block.
        step_keys = jax.vmap(jax.random.fold_in)(keys, self.step)
        sampled, logps = sampling.sample_with_logp(step_keys, logits, options)
        is_stop = jnp.asarray(options.stops)[sampled]
        # A maximum is finite exactly if nothing is NaN and not all logits are infinite.
        finite = jnp.isfinite(jnp.max(self.logits, axis=-1))
        sampled_status = jnp.where(is_stop, STOPPED, RUNNING)
        sampled_status = jnp.where(finite, sampled_status, BROKEN)
        # Rows that have ended still compute, since shapes are fixed, but nothing of theirs changes.
        running = (self.status == RUNNING) & ~is_known & ~paused
        status = jnp.where(running, sampled_status, self.status)
        tokens = jnp.where(is_known, known.tokens, sampled)
        drawn = running & (status == RUNNING)
        live = jnp.where(is_known, known.live, drawn)
        next_logits, state = read_token(
            config, params, self.state, tokens=tokens, live=live
        )
        following = DecodeState(
            state=state,
            logits=jnp.where(live[:, None], next_logits, self.logits),
            status=status,
            stop_tokens=jnp.where(
                running & (status == STOPPED), tokens, self.stop_tokens
            ),
            occurrences=sampling.count(
                self.occurrences, tokens, options, counted=running
            ),
            step=self.step + jnp.where(running, 1, 0),
        )
        return following, tokens, logps, live

    @jax.jit
    def stop_rows(
        self, rows: Bool[Array, " B"], earlier: "DecodeState"
    ) -> "DecodeState":
        """Stops `rows` with the state and the logits of `earlier`."""
        return self._replace(
            state=restore_rows(rows, earlier.state, self.state),
            logits=jnp.where(rows[:, None], earlier.logits, self.logits),
            status=jnp.where(rows, STOPPED, self.status),
            # A stop string cut these rows before any stop id that they may have drawn later.
            stop_tokens=jnp.where(rows, NO_TOKEN, self.stop_tokens),
        )


class Decoded(NamedTuple):
    """What one call of `decode` generated.

    Attributes:
        run: the state afterwards.
        tokens: [B C] int32, of each row first those that are kept.
        logps: [B C] float32, log-probabilities of the draws; after those of the tokens that are
            kept comes that of a stop id.
        lengths: [B] int32, how many of each row's tokens are kept.
        scores: the model's, [B C] and [B C K]; None where they were not asked for.
    """

    run: DecodeState
    tokens: Array
    logps: Array
    lengths: Array
    scores: sampling.ModelScores | None = None


@functools.partial(jax.jit, static_argnums=0)
def prefill(
    model: nn.Module,
    params: Params,
    state: RWKV7State,
    *,
    tokens: Tokens,
    lengths: Lengths | None = None,
) -> RWKV7State:
    """Reads the first `lengths` tokens of each row; computes no logits.

    Without lengths all tokens are read, and the program has no mask to apply at every token.
    """
    outputs: Any = model.apply(
        {"params": params}, tokens, state, lengths, method="hidden"
    )
    return outputs[1]


def prefill_rows(
    model: nn.Module,
    params: Params,
    state: RWKV7State,
    rows: Sequence[Sequence[int]],
    *,
    chunk: int,
) -> RWKV7State:
    """Reads rows of any lengths, `chunk` tokens at a time; an empty row does not change."""
    for first, width in chunk_widths(max(map(len, rows)), chunk):
        tokens, lengths = cut_chunk(rows, first, width)
        state = prefill(model, params, state, tokens=tokens, lengths=lengths)
    return state


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("capacity", "alternatives")
)
def decode(
    model: nn.Module,
    params: Params,
    run: DecodeState,
    *,
    known: KnownTokens,
    keys: Array,
    options: sampling.SamplingParams,
    limits: Int[Array, " B"],
    capacity: int,
    alternatives: int = 0,
    scored: Bool[Array, ""] | bool = False,
) -> Decoded:
    """Reads known tokens, then generates up to `limits`, in one program on the device.

    It ends early when every row has stopped. A row that stops, or is at its limit, keeps the state
    and the logits it had: neither the token that stopped it nor any later one is read.

    Args:
        model: static.
        params: the weights, from `split_params`.
        run: the state to continue.
        known: a token for each row before those that are generated.
        keys: [B], one for each row; token number t uses the key folded with t.
        options: how to sample.
        limits: tokens that each row generates, at most `capacity`.
        capacity: width of the returned tokens, static.
        alternatives: most probable ids beside each token in the model's scores (K), static; with 0
            there are no scores.
        scored: whether this call fills them in.
    """
    # The batch's size is known when the program is traced; only `limits` are not.
    batch = run.logits.shape[0]

    def unfinished(loop):
        done, index = loop
        drawing = (done.run.status == RUNNING) & (index < limits)
        return (index < 0) | jnp.any(drawing)

    def one_token(loop):
        done, index = loop
        is_known = index < 0
        run, read, logps, live = done.run.advance(
            model.config,
            params,
            known=known,
            is_known=is_known,
            paused=index >= limits,
            keys=keys,
            options=options,
        )
        live = live & ~is_known

        def score(scores):
            new = sampling.score_tokens(done.run.logits, read, alternatives)
            return jax.tree.map(lambda all, one: all.at[:, index].set(one), scores, new)

        scores = done.scores
        if alternatives:
            scores = jax.lax.cond(scored & ~is_known, score, lambda same: same, scores)
        following = Decoded(
            run=run,
            # For known tokens this is the last column, which stays zero.
            tokens=done.tokens.at[:, index].set(jnp.where(live, read, 0)),
            logps=done.logps.at[:, index].set(jnp.where(is_known, 0, logps)),
            lengths=done.lengths + live.astype(jnp.int32),
            scores=scores,
        )
        return following, index + 1

    # Known tokens are read by the same loop's body as sampled ones: another would be compiled too.
    first = jnp.where(jnp.any(known.live), -1, 0)
    nothing = Decoded(
        run=run._replace(state=split_state(run.state)),
        tokens=jnp.zeros((batch, capacity), jnp.int32),
        logps=jnp.zeros((batch, capacity), jnp.float32),
        lengths=jnp.zeros(batch, jnp.int32),
        scores=_no_scores(batch, capacity, alternatives),
    )
    done, _ = jax.lax.while_loop(unfinished, one_token, (nothing, first))
    joined = done.run._replace(state=join_states(done.run.state))
    return done._replace(run=joined)


def _no_scores(
    batch: int, capacity: int, alternatives: int
) -> sampling.ModelScores | None:
    if not alternatives:
        return None
    shape = (batch, capacity, alternatives)
    return sampling.ModelScores(
        drawn=jnp.zeros(shape[:2], jnp.float32),
        ids=jnp.zeros(shape, jnp.int32),
        logps=jnp.zeros(shape, jnp.float32),
    )


class Decoder:
    """The model, weights, keys and sampling options that stay the same while a batch decodes.

    They are not fields of `DecodeState`: a compiled loop returns everything it carries, so the
    weights would be copied.

    Attributes:
        block: tokens that one call of `decode` generates at most.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params,
        *,
        keys: Array,
        options: sampling.SamplingParams,
        block: int,
    ):
        """Binds what every program of one call needs, and splits the weights by layers.

        Args:
            model: static.
            params: the weights.
            keys: [B] typed random keys.
            options: how to sample.
            block: tokens that one call of `decode` generates at most.
        """
        self.block = block
        self._model = model
        self._params = params
        self._layers = split_params(params)
        self._keys = keys
        self._options = options

    def read(
        self,
        run: DecodeState,
        rows: Sequence[Sequence[int]],
        *,
        chunk: int = _NARROWEST,
    ) -> DecodeState:
        """Reads known tokens, `chunk` at a time; an empty row does not change.

        The head runs for each row's last token alone: logits of a whole chunk would be the largest
        array here.
        """
        lengths = np.array([len(row) for row in rows], np.int32)
        state = prefill_rows(
            self._model,
            self._params,
            run.state,
            [row[:-1] for row in rows],
            chunk=chunk,
        )
        # An empty row gets a token too, which `live` keeps it from reading.
        last_tokens = np.array([row[-1] if row else 0 for row in rows], np.int32)
        known = KnownTokens(last_tokens, lengths > 0)
        return self._decode(run._replace(state=state), known, limit=0).run

    def decode(self, run: DecodeState, *, limit: int) -> Decoded:
        """Generates up to `limit` tokens, at most a block, as the function `decode` does."""
        batch = run.logits.shape[0]
        none = KnownTokens(np.zeros(batch, np.int32), np.zeros(batch, bool))
        return self._decode(run, none, limit=limit)

    def _decode(self, run: DecodeState, known: KnownTokens, *, limit: int) -> Decoded:
        return decode(
            self._model,
            self._layers,
            run,
            known=known,
            keys=self._keys,
            options=self._options,
            limits=np.full(run.logits.shape[0], limit, np.int32),
            # A power of two, so that few widths are ever compiled.
            capacity=power_of_two(max(self.block, _SMALLEST_BLOCK)),
        )


def chunk_widths(total: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Yields where each chunk of `total` tokens begins and the width of the program it needs."""
    for first in range(0, total, chunk):
        yield first, min(chunk, max(_NARROWEST, power_of_two(total - first)))


def cut_chunk(
    rows: Sequence[Sequence[int]], first: int, width: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Cuts the tokens from `first` on out of each row, and returns how many of them each has."""
    tokens = np.zeros((len(rows), width), np.int32)
    lengths = np.zeros(len(rows), np.int32)
    for index, row in enumerate(rows):
        part = row[first : first + width]
        tokens[index, : len(part)] = part
        lengths[index] = len(part)
    return tokens, lengths


def power_of_two(least: int) -> int:
    """Returns the smallest power of two that is at least `least`."""
    return 1 << max(least - 1, 0).bit_length()
