"""What an observer is worth: the teacher's answers from its proposals, and its drift."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Lengths, Params, Tokens
from rwkv7_jax.checks import check_lengths, check_tokens
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.model.layers import head_logits
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, check_state, init_state, repeat
from rwkv7_jax.observer.observer import (
    Observer,
    check_maps,
    check_teacher,
    fraction_of_variance_unexplained,
    moments,
    propose_wkv,
    read_prompts,
)
from rwkv7_jax.observer.prompt_splits import check_split, continuations
from rwkv7_jax.training.losses import loss_weights, map_token_chunks


class Answers(NamedTuple):
    """How well a model answers behind the splits, over all targets that count.

    Attributes:
        accuracy: share of targets that had the largest logit.
        nats: mean loss.
    """

    accuracy: float
    nats: float


@functools.partial(jax.jit, static_argnums=0)
def _answers(teacher: RWKV7, params: Params, start: RWKV7State, batch: Batch):
    inputs, targets, shares = continuations(batch.tokens, batch.split, loss_weights(batch))
    x, _ = teacher.apply({"params": params}, inputs, start, method="hidden")

    def per_token(x, targets):
        logits = head_logits(x, params["head"]["weight"])
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        right = jnp.argmax(logits, axis=-1) == targets
        return right.astype(jnp.float32), jax.nn.logsumexp(logits, axis=-1) - chosen

    right, nats = map_token_chunks(per_token, x, targets)
    return jnp.sum(shares * right), jnp.sum(shares * nats)


def evaluate_handover(
    teacher: RWKV7, teacher_params: Params, state: RWKV7State, batch: BatchLike
) -> dict[str, Answers]:
    """How the teacher answers behind each row's split, by the state that it starts from.

    The keys: `zero`, where the prompt is unknown; `wkv`, its own WKV states at the split with zero
    token shifts, the most that a proposal can be; `own`, its own whole state, as if it had read on;
    `proposed`, what is given.

    Args:
        teacher: the shell around `teacher_params`.
        teacher_params: all weights.
        state: what `propose(observer, params, batch.tokens[:, :-1], batch.split)` gives,
            or any other start state, such as a tuned one of batch 1.
        batch: tokens [B T+1], mask [B T] and split [B]; masked targets do not count.

    Raises:
        TypeError: ids or splits that are no integers, or a WKV state that is not float32.
        ValueError: a batch or a state of other sizes.
    """
    batch = check_split(batch, teacher.config.vocab_size, caller="evaluate_handover")
    rows = batch.tokens.shape[0]
    if isinstance(state, RWKV7State) and state.batch == 1:
        state = repeat(state, rows)
    check_state(state, rows, teacher.config, caller="evaluate_handover")
    batch = Batch(tokens=batch.tokens, mask=batch.mask, split=batch.split)
    zero = init_state(teacher.config, rows)
    _, own = read_prompts(teacher, teacher_params, batch.tokens[:, :-1], batch.split)
    starts = {"zero": zero, "wkv": zero.replace(wkv=own.wkv), "own": own, "proposed": state}
    answers = {
        name: _answers(teacher, teacher_params, start, batch) for name, start in starts.items()
    }
    return {name: Answers(*map(float, pair)) for name, pair in answers.items()}


def proposal_error(
    observer: Observer,
    params: Params,
    teacher: RWKV7,
    teacher_params: Params,
    tokens: Tokens,
    *,
    lengths: Lengths | None = None,
    variance: Float[Array | np.ndarray, "L H"] | None = None,
) -> Float[Array, " B"]:
    """How far each row's proposal is from the teacher's state: 0 is right, 1 as bad as the mean.

    Live traffic is judged by the variance of typical prompts, `state_moments(...).variance`: one
    row has none of its own, and one that drifts would excuse itself with it.

    Args:
        observer: which models.
        params: the observer's.
        teacher: the shell around `teacher_params`.
        teacher_params: all weights.
        tokens: what was read.
        lengths: tokens of each row that count, from the left.
        variance: of the teacher's states in typical prompts; the rows' own if it is not given.

    Raises:
        TypeError: ids or lengths that are no integers.
        ValueError: models, ids or lengths that do not fit, or one row without a variance.
    """
    caller = "drift"
    check_teacher(observer, teacher.config, caller=caller)
    check_maps(observer, params, caller=caller)
    check_tokens(tokens, teacher.config.vocab_size, caller=caller)
    if lengths is not None:
        check_lengths(lengths, tuple(tokens.shape), caller=caller)
    if variance is None and tokens.shape[0] < 2:
        raise ValueError("proposal_error: `variance` must be given for one row; see state_moments.")
    if variance is not None and tuple(variance.shape) != observer.shapes["bias"][:2]:
        raise ValueError(
            f"proposal_error: `variance` must be [layers, heads] = {observer.shapes['bias'][:2]}; "
            f"got {tuple(variance.shape)}."
        )
    _, proposed = propose_wkv(observer, params, tokens, lengths)
    _, own = read_prompts(teacher, teacher_params, tokens, lengths)
    variance = moments(own.wkv).variance if variance is None else jnp.asarray(variance)
    return fraction_of_variance_unexplained(proposed, own.wkv, variance)
