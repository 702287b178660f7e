"""The compiled program that decodes on the device, and the state that it carries.

The model is a static argument, any module with the methods of RWKV-7; the weights are traced. The
program is specialised only on the batch size and a width. Limits, temperatures and masks are
traced.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import platforms
from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import check_not_intercepted, prefix_errors
from rwkv7_jax.generation import sampling
from rwkv7_jax.generation.prefill import NARROWEST, power_of_two, prefill_rows
from rwkv7_jax.model import products
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import RWKV7State, restore_rows, select
from rwkv7_jax.model.unrolled import join_states, read_token, split_params, split_state
from rwkv7_jax.sharding import mesh_sizes

# Values of `DecodeState.status`.
RUNNING = 0
STOPPED = 1
BROKEN = 2

# Marks rows without a stop id in `DecodeState.stop_tokens`; an array cannot hold None.
NO_TOKEN = -1

# Width of the narrowest buffer of generated tokens.
_SMALLEST_BLOCK = 8


class KnownTokens(NamedTuple):
    """One known token per row, read instead of a sampled one.

    Attributes:
        tokens: [B] ids.
        live: [B] mask of the rows that read their token.
    """

    tokens: Array | np.ndarray
    live: Array | np.ndarray


class DecodeState(NamedTuple):
    """The state of a batch during generation.

    Attributes:
        state: the recurrent state after every kept token; inside `decode`, one entry per layer.
        logits: [B V] float32 logits of the next token.
        status: [B] RUNNING, STOPPED, or BROKEN if the logits were not finite.
        stop_tokens: [B] int32, the stop id that ended the row, or NO_TOKEN.
        occurrences: ids generated so far, for the penalties.
        step: [B] int32, number of tokens generated so far.
    """

    state: Any
    logits: Array
    status: Array
    stop_tokens: Array
    occurrences: sampling.Occurrences
    step: Array

    @classmethod
    def create(cls, state: RWKV7State, logits: Float[Array, "B V"]) -> "DecodeState":
        """Starts every row with no generated token."""
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
        """Reads one sampled or known token per row; `state` must come from `split_state`.

        A row that stops here keeps its state and logits. Known tokens neither stop a row nor count
        for the penalties. Paused rows sample nothing.

        Returns:
            The next state, the tokens, the log-probabilities of sampled tokens, and a mask of the
            rows that have read their token.
        """
        logits = sampling.apply_penalties(self.logits, self.occurrences, options)
        # Folded with the step, not split, so that a row's samples do not depend on the block size.
        step_keys = jax.vmap(jax.random.fold_in)(keys, self.step)
        sampled, logps = sampling.sample_with_logp(step_keys, logits, options)
        is_stop = jnp.asarray(options.stops)[sampled]
        # The maximum is finite exactly if no logit is NaN or +Inf, and not all are -Inf.
        finite = jnp.isfinite(jnp.max(self.logits, axis=-1))
        sampled_status = jnp.where(is_stop, STOPPED, RUNNING)
        sampled_status = jnp.where(finite, sampled_status, BROKEN)
        # Finished rows still compute, because shapes are fixed, but they do not change.
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
        """Stops `rows` with the state and logits of `earlier`."""
        return self._replace(
            state=restore_rows(rows, earlier.state, self.state),
            logits=jnp.where(rows[:, None], earlier.logits, self.logits),
            status=jnp.where(rows, STOPPED, self.status),
            # The stop string comes before any stop id that these rows may have drawn later.
            stop_tokens=jnp.where(rows, NO_TOKEN, self.stop_tokens),
        )


class Decoded(NamedTuple):
    """The result of one call of `decode`.

    Attributes:
        run: the state afterwards.
        tokens: [B C] int32, the kept tokens of each row, padded with zeros.
        logps: [B C] float32, log-probabilities of the samples: those of the kept tokens, then that
            of a stop id.
        lengths: [B] int32, number of kept tokens in each row.
        scores: the model's scores, [B C] and [B C K]; None if not requested.
    """

    run: DecodeState
    tokens: Array
    logps: Array
    lengths: Array
    scores: sampling.ModelScores | None = None


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
    """Reads known tokens, then generates up to `limits` tokens, in one program on the device.

    Ends early once every row has stopped. A row that stops or reaches its limit keeps its state and
    logits: neither the token that stopped it nor any later one is read.

    Args:
        model: the model (static).
        params: the weights, from `split_params`.
        run: the state to continue from.
        known: one token per row to read before generating.
        keys: [B] random keys; token t uses its row's key folded with t.
        options: sampling options.
        limits: maximum number of new tokens of each row, at most `capacity`.
        capacity: width of the returned tokens (static).
        alternatives: number of most probable ids in the model's scores of each token, K (static); 0
            for no scores.
        scored: whether this call computes the scores.
    """
    batch = run.logits.shape[0]
    is_tpu = platforms.target_platform() == "tpu"
    # On a mesh, XLA would move the copies between devices.
    if is_tpu and batch < products.TPU_ROWS and not mesh_sizes():
        return _decode_next_to_copies(
            model,
            params,
            run,
            known=known,
            keys=keys,
            options=options,
            limits=limits,
            capacity=capacity,
            alternatives=alternatives,
            scored=scored,
        )

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
        scores = done.scores
        if scores is not None:
            is_wanted = scored & ~is_known
            scores = _add_scores(scores, done.run.logits, read, index, is_wanted)
        following = Decoded(
            run=run,
            # For known tokens the index is -1, the last column, which is written with zeros.
            tokens=done.tokens.at[:, index].set(jnp.where(live, read, 0)),
            logps=done.logps.at[:, index].set(jnp.where(is_known, 0, logps)),
            lengths=done.lengths + live.astype(jnp.int32),
            scores=scores,
        )
        return following, index + 1

    # Known tokens use the same loop body as sampled ones, so that it is compiled only once.
    first = jnp.where(jnp.any(known.live), -1, 0)
    nothing = Decoded(
        run=run._replace(state=split_state(run.state, model.config.implementation)),
        tokens=jnp.zeros((batch, capacity), jnp.int32),
        logps=jnp.zeros((batch, capacity), jnp.float32),
        lengths=jnp.zeros(batch, jnp.int32),
        scores=_no_scores(batch, capacity, alternatives),
    )
    done, _ = jax.lax.while_loop(unfinished, one_token, (nothing, first))
    joined = done.run._replace(state=join_states(done.run.state))
    return done._replace(run=joined)


def _select_rows(tree: Any, rows: Int[np.ndarray, " S"]) -> Any:
    """Selects rows of everything that a batch carries."""

    def of_one(leaf):
        return select(leaf, rows) if isinstance(leaf, RWKV7State) else leaf[rows]

    return jax.tree.map(of_one, tree, is_leaf=lambda x: isinstance(x, RWKV7State))


def _decode_next_to_copies(
    model: nn.Module,
    params: Params,
    run: DecodeState,
    *,
    known: KnownTokens,
    keys: Array,
    options: sampling.SamplingParams,
    limits: Int[Array, " B"],
    **others: Any,
) -> Decoded:
    """Works as `decode` for fewer rows than a tile of a TPU, which it fills with copies of them.

    XLA's programs for fewer rows have more instructions (`benchmarks.decode_tpu`). The copies are
    stopped and read nothing.
    """
    batch = limits.shape[0]
    rows = np.resize(np.arange(batch), products.TPU_ROWS)
    is_own = np.arange(products.TPU_ROWS) < batch
    run = _select_rows(run, rows)
    decoded = decode(
        model,
        params,
        run._replace(status=jnp.where(is_own, run.status, STOPPED)),
        known=KnownTokens(known.tokens[rows], known.live[rows] & is_own),
        keys=keys[rows],
        options=sampling.select_options(options, rows),
        limits=limits[rows],
        **others,
    )
    return _select_rows(decoded, np.arange(batch))


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


def _add_scores(
    scores: sampling.ModelScores,
    logits: Float[Array, "B V"],
    tokens: Int[Array, " B"],
    index: Int[Array, ""],
    is_wanted: Bool[Array, ""],
) -> sampling.ModelScores:
    """Writes the scores of one token per row into column `index`, if they are wanted."""

    def write(scores):
        new = sampling.score_tokens(logits, tokens, scores.ids.shape[2])
        return jax.tree.map(lambda all, one: all.at[:, index].set(one), scores, new)

    return jax.lax.cond(is_wanted, write, lambda same: same, scores)


class Decoder:
    """The model, weights, keys and sampling options, which are constant while a batch decodes.

    They are not fields of `DecodeState`, because a compiled loop returns everything that it
    carries and would copy the weights.

    Attributes:
        block: maximum number of tokens that one call of `decode` generates.
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
        """Stores the arguments and splits the weights by layer.

        Args:
            model: the model.
            params: the weights.
            keys: [B] typed random keys.
            options: sampling options.
            block: maximum number of tokens that one call of `decode` generates.
        """
        self.block = block
        self._model = model
        self._params = params
        self._layers = split_params(params)
        self._keys = keys
        # Otherwise each call would send masks over the vocabulary to the device.
        self._options = jax.device_put(options)

    def read(
        self,
        run: DecodeState,
        rows: Sequence[Sequence[int]],
        *,
        chunk: int = NARROWEST,
    ) -> DecodeState:
        """Reads known tokens, `chunk` at a time; an empty row keeps its state and logits.

        The head runs only for each row's last token, because the logits of a whole chunk would be
        the largest array.

        Raises:
            ValueError: it is called inside `flax.linen.intercept_methods`.
        """
        with prefix_errors("Decoder"):
            check_not_intercepted()
        lengths = np.array([len(row) for row in rows], np.int32)
        state = prefill_rows(
            self._model,
            self._params,
            run.state,
            [row[:-1] for row in rows],
            chunk=chunk,
        )
        # An empty row gets a dummy token, which `live` masks.
        last_tokens = np.array([row[-1] if row else 0 for row in rows], np.int32)
        known = KnownTokens(last_tokens, lengths > 0)
        return self._decode(run._replace(state=state), known, limit=0).run

    def decode(self, run: DecodeState, *, limit: int) -> Decoded:
        """Generates up to `limit` tokens, at most a block; see the function `decode`.

        Raises:
            ValueError: it is called inside `flax.linen.intercept_methods`.
        """
        with prefix_errors("Decoder"):
            check_not_intercepted()
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
            # A power of two, so that only few widths are compiled.
            capacity=power_of_two(max(self.block, _SMALLEST_BLOCK)),
        )
