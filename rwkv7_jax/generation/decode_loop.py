"""Reading and generating tokens on the device, in a few compiled programs.

The model is any module with RWKV-7's calls, a static argument; weights are ordinary arguments.
Programs depend on the batch, on a width and on nothing else: limits, temperatures and masks are
traced.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rwkv7_jax.array_types import Lengths, Params, Tokens
from rwkv7_jax.generation import sampling
from rwkv7_jax.model.state import RWKV7State, where_rows

RUNNING, STOPPED, BROKEN = 0, 1, 2


class DecodeState(NamedTuple):
    """A batch in the middle of generating.

    Attributes:
        state: has read every token that was kept.
        logits: [B V] float32, for the token behind it.
        status: [B], RUNNING, STOPPED, or BROKEN when the logits held a NaN or an infinity.
        occurrences: what was generated, for the penalties.
        step: tokens generated so far, the same for every running row.
    """

    state: RWKV7State
    logits: Array
    status: Array
    occurrences: sampling.Occurrences
    step: Array


def init_decode_state(state: RWKV7State, logits: Float[Array, "B V"]) -> DecodeState:
    """Every row runs and has generated nothing."""
    return DecodeState(
        state=state,
        logits=logits,
        status=jnp.full(logits.shape[0], RUNNING, jnp.int32),
        occurrences=sampling.no_occurrences(*logits.shape),
        step=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def prefill(
    model: nn.Module, params: Params, state: RWKV7State, *, tokens: Tokens, lengths: Lengths
) -> RWKV7State:
    """The state behind the first `lengths` tokens of each row; no logits are made."""
    return model.apply({"params": params}, tokens, state, lengths, method="hidden")[1]


def _follow(model, params, state, *, logits, tokens, live):
    after, state = model.apply({"params": params}, tokens[:, None], state, live.astype(jnp.int32))
    return state, jnp.where(live[:, None], after[:, 0], logits)


@functools.partial(jax.jit, static_argnums=0)
def decode_one(
    model: nn.Module,
    params: Params,
    state: RWKV7State,
    *,
    logits: Float[Array, "B V"],
    tokens: Int[Array, " B"],
    live: Bool[Array, " B"],
) -> tuple[RWKV7State, Float[Array, "B V"]]:
    """The state and the logits one token later in the live rows, both unchanged in the others."""
    return _follow(model, params, state, logits=logits, tokens=tokens, live=live)


@jax.jit
def stop_rows(
    run: DecodeState, rows: Bool[Array, " B"], *, state: RWKV7State, logits: Float[Array, "B V"]
) -> DecodeState:
    """The run with `rows` stopped, at another state and other logits."""
    return run._replace(
        state=where_rows(rows, state, run.state),
        logits=jnp.where(rows[:, None], logits, run.logits),
        status=jnp.where(rows, STOPPED, run.status),
    )


def _advance(
    model, params, run: DecodeState, *, keys, options: sampling.SamplingParams
) -> tuple[DecodeState, Array, Array]:
    """The run one token later, the tokens, and the rows that keep theirs."""
    logits = sampling.apply_penalties(run.logits, run.occurrences, options)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, run.step)
    tokens = sampling.sample(keys, logits, options)
    # A maximum is finite exactly if nothing is NaN and not all logits are infinite.
    finite = jnp.isfinite(jnp.max(run.logits, axis=-1))
    ending = jnp.where(finite, jnp.where(options.stops[tokens], STOPPED, RUNNING), BROKEN)
    status = jnp.where(run.status == RUNNING, ending, run.status)
    live = status == RUNNING
    state, after = _follow(model, params, run.state, logits=run.logits, tokens=tokens, live=live)
    occurrences = sampling.count(run.occurrences, tokens, options)
    return DecodeState(state, after, status, occurrences, run.step + 1), tokens, live


@functools.partial(jax.jit, static_argnums=0, static_argnames="capacity")
def decode(
    model: nn.Module,
    params: Params,
    run: DecodeState,
    *,
    keys: Array,
    options: sampling.SamplingParams,
    limit: Int[Array, ""],
    capacity: int,
) -> tuple[DecodeState, Int[Array, "B C"], Int[Array, " B"]]:
    """The run at most `limit` tokens later, these tokens, and how many of each row's are kept.

    One program on the device; it ends early when every row has stopped. A row that stops keeps the
    state and the logits it had: neither the token that stopped it nor any later one is read.

    Args:
        model: static.
        params: the weights.
        run: where to go on.
        keys: [B], one a row; token number t uses the key folded with t.
        options: how to choose.
        limit: tokens to generate, at most `capacity`.
        capacity: width of the returned tokens, static.
    """
    batch = run.logits.shape[0]

    def unfinished(loop):
        run, _, _, index = loop
        return (index < limit) & jnp.any(run.status == RUNNING)

    def one_token(loop):
        run, tokens, lengths, index = loop
        run, token, live = _advance(model, params, run, keys=keys, options=options)
        tokens = tokens.at[:, index].set(jnp.where(live, token, 0))
        return run, tokens, lengths + live, index + 1

    empty = jnp.zeros((batch, capacity), jnp.int32)
    loop = (run, empty, jnp.zeros(batch, jnp.int32), jnp.zeros((), jnp.int32))
    run, tokens, lengths, _ = jax.lax.while_loop(unfinished, one_token, loop)
    return run, tokens, lengths
