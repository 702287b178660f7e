"""Evaluation of an observer: the teacher's answers from its proposals, and their error."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Lengths, Params, Tokens
from rwkv7_jax.checks import (
    as_array,
    check_instance,
    check_number,
    check_runnable,
    is_known,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, check_state, init_state, repeat
from rwkv7_jax.observer.observer import (
    Observer,
    check_maps,
    check_prompt_tokens,
    check_teacher,
    fraction_of_variance_unexplained,
    moments,
    propose_wkv,
    read_prompts,
)
from rwkv7_jax.observer.prompt_splits import check_answers, check_split, continuations
from rwkv7_jax.training.head_loss import token_statistics, weighted_sum
from rwkv7_jax.training.losses import loss_weights


class Answers(NamedTuple):
    """The quality of the answers after the splits, over all targets in the mask.

    Attributes:
        accuracy: fraction of targets with the largest logit.
        nats: mean loss.
    """

    accuracy: float
    nats: float


@functools.partial(jax.jit, static_argnums=0)
def _score_answers(teacher: RWKV7, params: Params, start: RWKV7State, batch: Batch):
    """Computes the teacher's accuracy and mean loss after the splits, from its start states."""
    inputs, targets, shares = continuations(
        batch.tokens, batch["split"], loss_weights(batch)
    )
    x, _ = teacher.apply({"params": params}, inputs, start, method="hidden")
    statistics = token_statistics(x, params["head"]["weight"], targets)
    correct = jnp.sum(shares * statistics.correct.astype(shares.dtype))
    return correct, weighted_sum(shares, statistics.nats)


def evaluate_handover(
    teacher: RWKV7, teacher_params: Params, state: RWKV7State, batch: BatchLike
) -> dict[str, Answers]:
    """Measures the teacher's answers after each row's split from several start states.

    The keys of the result:

    * `zero`: zeros, as without a prompt.
    * `wkv`: the teacher's own WKV states at the split with zero token shifts, the best possible
      proposal.
    * `own`: the teacher's own state with token shifts, as if it read on.
    * `proposed`: the given state.

    Args:
        teacher: the shell around `teacher_params`.
        teacher_params: all weights.
        state: the result of `propose(observer, params, batch["tokens"][:, :-1], batch["split"])`,
            or any other start state, such as a tuned one of batch 1.
        batch: tokens [B T+1], mask [B T] and split [B]; masked targets do not count.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a batch, a state or weights of other sizes, or no unmasked target after a split.
    """
    with prefix_errors("evaluate_handover"):
        check_runnable(teacher, teacher_params, "`teacher`", "`teacher_params`")
        # Weights are ignored.
        batch = Batch.of(batch, "mask").replace(weights=None)
        batch = check_split(batch, teacher.config.vocab_size)
        check_answers(batch)
        check_instance(state, RWKV7State, "`state`")
        rows = batch.tokens.shape[0]
        if state.batch == 1:
            state = repeat(state, rows)
        check_state(state, rows, teacher.config)
    # Other fields would become arguments of the program, which compiles again for each set of them.
    batch = Batch(tokens=batch.tokens, mask=batch.mask, split=batch.split)
    zero = init_state(teacher.config, rows)
    _, own = read_prompts(teacher, teacher_params, batch.inputs, batch.split)
    starts = {
        "zero": zero,
        "wkv": zero.replace(wkv=own.wkv),
        "own": own,
        "proposed": state,
    }
    answers = {}
    for name, start in starts.items():
        # States of equal shapes share one compiled program.
        accuracy, nats = _score_answers(teacher, teacher_params, start, batch)
        answers[name] = Answers(float(accuracy), float(nats))
    return answers


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
    """Measures the error of each row's proposal: 0 is exact, 1 is as bad as the mean state.

    For live traffic, pass the variance of typical prompts, `state_moments(...).variance`. A single
    row has no variance, and normalising by a drifting batch's own variance would hide the drift.

    Args:
        observer: the shells of both models.
        params: the observer's.
        teacher: the shell around `teacher_params`.
        teacher_params: all weights.
        tokens: prompts.
        lengths: the number of real tokens of each row; padding is on the right.
        variance: of the teacher's states in typical prompts; by default that of the rows.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: models, ids or lengths that do not match, one row without a variance, or a
            variance that is negative or not finite.
    """
    with prefix_errors("proposal_error"):
        check_instance(observer, Observer, "`observer`")
        check_runnable(teacher, teacher_params, "`teacher`", "`teacher_params`")
        check_teacher(observer, teacher.config)
        check_maps(observer, params)
        tokens, lengths = check_prompt_tokens(
            tokens, lengths, teacher.config.vocab_size
        )
        if variance is None and tokens.shape[0] < 2:
            raise ValueError("`variance` must be given for one row; see state_moments.")
        shape = observer.shapes["bias"][:2]
        typical = None if variance is None else as_array(variance, "`variance`")
        if typical is not None and tuple(typical.shape) != shape:
            raise ValueError(
                f"`variance` must be [layers, heads] = {shape}; got {tuple(typical.shape)}."
            )
        if typical is not None and is_known(typical):
            # NaN is both the least and the largest.
            for extreme in (np.min(typical), np.max(typical)):
                check_number(extreme, 0, math.inf, "`variance`")
    _, proposed = propose_wkv(observer, params, tokens, lengths)
    _, own = read_prompts(teacher, teacher_params, tokens, lengths)
    scale = moments(own.wkv).variance if typical is None else jnp.asarray(typical)
    return fraction_of_variance_unexplained(proposed, own.wkv, scale)
