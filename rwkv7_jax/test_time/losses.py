"""Losses of the start state: imitation of a teacher, and policy gradients.

Both take batches of completions: `tokens` [B T+1] and `mask` [B T], which is above 0 for sampled
targets. The weights are frozen; the state has batch 1 and every row starts from it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import (
    check_instance,
    check_model,
    check_number,
    check_params,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.generation.sampling import Number
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, check_state, init_state
from rwkv7_jax.training.head_loss import (
    PerToken,
    TermWeights,
    token_statistics,
    weighted_loss,
    weighted_sum,
)
from rwkv7_jax.training.losses import (
    Loss,
    Metrics,
    check_targets,
    target_shares,
)
from rwkv7_jax.tuning.state_tuning import (
    StartStateLoss,
    check_leaves,
    hidden_states_from,
    stop_gradient_except,
)

Scalar = Float[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False)
class _DistillationLoss(StartStateLoss):
    """The loss of `distillation_loss`, with the frozen arrays as its first arguments.

    The arrays are arguments because jit compiles closed-over arrays in as constants.

    Attributes:
        teacher: the teacher's network, or None.
        imitation: weight of the cross entropy of completions.
        kl: weight of KL(teacher || student).
    """

    teacher: RWKV7 | None
    imitation: float
    kl: float

    def __call__(
        self,
        params: Params,
        teacher_params: Params | None,
        teacher_state: RWKV7State | None,
        state: RWKV7State,
        batch: BatchLike,
    ) -> tuple[Scalar, Metrics]:
        """Computes the loss and its metrics."""
        with prefix_errors("distillation_loss"):
            batch = self.check_batch(batch)
            check_targets(batch)
            state = stop_gradient_except(state, self.leaves)
        weights = target_shares(batch, self.model.config.vocab_size)
        inputs = jnp.asarray(batch.inputs)
        reference = None
        reference_head = None
        kl_weights = None
        if self.teacher is not None:
            assert teacher_params is not None and teacher_state is not None
            reference = jax.lax.stop_gradient(
                hidden_states_from(self.teacher, teacher_params, teacher_state, inputs)
            )
            reference_head = teacher_params["head"]["weight"]
            kl_weights = self.kl * weights
        value, tokenwise = weighted_loss(
            hidden_states_from(self.model, params, state, inputs),
            params["head"]["weight"],
            jnp.asarray(batch.targets),
            TermWeights(nats=self.imitation * weights, kl=kl_weights),
            reference=reference,
            reference_head=reference_head,
        )
        metrics = {"loss_nats": weighted_sum(weights, tokenwise.nats)}
        if self.teacher is not None:
            metrics["kl_nats"] = weighted_sum(weights, tokenwise.kl)
        return self.with_anchor(params, state, batch, value, metrics)


def distillation_loss(
    model: RWKV7,
    params: Params,
    *,
    teacher: RWKV7 | None = None,
    teacher_params: Params | None = None,
    teacher_state: RWKV7State | None = None,
    imitation: float = 1.0,
    kl: float = 1.0,
    leaves: tuple[str, ...] = ("wkv",),
    anchor: float = 0.0,
) -> Loss:
    """Makes the loss `imitation` x cross entropy of completions + `kl` x KL(teacher || student).

    Both terms are means over the tokens of completions, weighted by the weights of their traces.
    The second term needs a teacher, which reads the same rows as the student, from
    `teacher_state`.

    Metrics: `loss_nats` is the cross entropy, `kl_nats` the divergence; `anchor_nats`, `state_max`
    and `state_rms` as in `state_tuning.state_loss`.

    Args:
        model: the student.
        params: its weights.
        teacher: a model with the same vocabulary; None for the cross entropy only.
        teacher_params: its weights.
        teacher_state: start state of the teacher (batch 1); None for zeros.
        imitation: weight of the cross entropy of completions.
        kl: weight of the divergence.
        leaves: the trainable leaves, from `state_tuning.LEAVES`.
        anchor: weight of KL(base || tuned) on `batch.anchor`, unlabelled tokens [B T+1].

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the vocabularies differ, only one of `teacher` and `teacher_params` is given, a
            leaf is unknown, or a weight is negative.
    """
    with prefix_errors("distillation_loss"):
        check_model(model)
        check_params(params, model.config)
        check_leaves(leaves)
        check_number(imitation, 0, math.inf, "`imitation`")
        check_number(kl, 0, math.inf, "`kl`")
        check_number(anchor, 0, math.inf, "`anchor`")
        teacher_state = _check_teacher(model, teacher, teacher_params, teacher_state)
    loss = _DistillationLoss(
        model=model,
        teacher=teacher,
        imitation=imitation,
        kl=kl,
        leaves=tuple(leaves),
        anchor=anchor,
    )
    return Partial(loss, params, teacher_params, teacher_state)


def _check_teacher(
    model: RWKV7,
    teacher: RWKV7 | None,
    teacher_params: Params | None,
    teacher_state: RWKV7State | None,
) -> RWKV7State | None:
    """Checks the teacher; returns its start state, or None without a teacher."""
    if (teacher is None) != (teacher_params is None):
        missing = "teacher" if teacher is None else "teacher_params"
        raise ValueError(
            f"`teacher` and `teacher_params` must be given together; `{missing}` is None."
        )
    if teacher is None:
        if teacher_state is not None:
            raise ValueError("`teacher_state` must be None without a `teacher`.")
        return None
    check_model(teacher, "`teacher`")
    ours = model.config.vocab_size
    theirs = teacher.config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"`teacher` must have the student's vocabulary size, {ours}; got {theirs}."
        )
    check_params(teacher_params, teacher.config, "`teacher_params`")
    return _start_state(teacher_state, teacher, "teacher_state")


def _start_state(state: RWKV7State | None, model: RWKV7, argument: str) -> RWKV7State:
    """Checks the start state in `argument`; None becomes zeros."""
    if state is None:
        return init_state(model.config)
    try:
        check_state(state, 1, model.config)
    except (TypeError, ValueError) as error:
        # The message of the check names `state`, not the argument.
        raise type(error)(f"`{argument}`: {error}") from None
    return state


def context_distillation(
    model: RWKV7,
    params: Params,
    context: RWKV7State,
    *,
    leaves: tuple[str, ...] = ("wkv",),
) -> Loss:
    """Makes the loss KL(the model after `context` || the model from its start state).

    It compresses a long prompt into a start state. The prompt is read once:
    `context = generate(model, params, ids, tokens=0).state`. Rows may be any text that can follow
    the prompt; the model's own continuations are best:
    `collect_traces(sampler, prompts, state=context, ...)`.

    Args:
        model: teacher and student.
        params: its weights.
        context: the state after the prompt (batch 1).
        leaves: the trainable leaves, from `state_tuning.LEAVES`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the weights or the context do not fit the model, or a leaf is unknown.
    """
    with prefix_errors("context_distillation"):
        check_model(model)
        check_instance(context, RWKV7State, "`context`")
        _start_state(context, model, "context")
        return distillation_loss(
            model,
            params,
            teacher=model,
            teacher_params=params,
            teacher_state=context,
            imitation=0.0,
            leaves=leaves,
        )


def _log_bounds(epsilon_low: float, epsilon_high: float) -> tuple[float, float]:
    """Returns the clipping bounds of the log-ratio, which cannot overflow."""
    check_number(epsilon_low, 0, 1, "`epsilon_low`")
    check_number(epsilon_high, 0, math.inf, "`epsilon_high`")
    low = -math.inf if epsilon_low == 1 else math.log1p(-epsilon_low)
    return low, math.log1p(epsilon_high)


def _clipped_ratio(
    log_ratio: PerToken,
    advantages: Float[Array, "B 1"],
    bounds: tuple[float, float],
) -> tuple[PerToken, PerToken]:
    """Clips ratios on the side that would increase the objective; returns which were clipped."""
    low, high = bounds
    # `jnp.minimum` would halve the gradient exactly at the bound.
    is_clipped = jnp.where(advantages > 0, log_ratio > high, log_ratio < low)
    bound = jnp.where(advantages > 0, high, low)
    ratio = jnp.exp(jnp.where(is_clipped, bound, log_ratio))
    # With an advantage of 0 there is no gradient to clip.
    return ratio, (is_clipped & (advantages != 0)).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def drawn_logps(
    model: RWKV7,
    params: Params,
    state: RWKV7State,
    tokens: Int[Array | np.ndarray, "B T1"],
    temperature: Number,
) -> PerToken:
    """Computes the log-probability of each target as `policy_loss` does.

    Args:
        model: the network.
        params: its weights.
        state: start state of every row (batch 1).
        tokens: tokens of the rows.
        temperature: sampling temperature.
    """
    tokens = jnp.asarray(tokens)
    hidden = hidden_states_from(model, params, state, tokens[:, :-1])
    statistics = token_statistics(
        hidden, params["head"]["weight"], tokens[:, 1:], temperature=temperature
    )
    return -statistics.nats


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyLoss(StartStateLoss):
    """The loss of `policy_loss`, with the frozen arrays as its first arguments.

    Attributes:
        temperature: sampling temperature of the rows.
        kl: weight of the divergence.
        bounds: clipping bounds of the log-ratio.
    """

    temperature: Number
    kl: float
    bounds: tuple[float, float]

    def __call__(
        self,
        params: Params,
        reference: RWKV7State,
        state: RWKV7State,
        batch: BatchLike,
    ) -> tuple[Scalar, Metrics]:
        """Computes the loss and its metrics."""
        with prefix_errors("policy_loss"):
            batch = self.check_batch(batch)
            check_targets(batch)
            state = stop_gradient_except(state, self.leaves)
        value, metrics = self._policy_and_divergence(params, reference, state, batch)
        return self.with_anchor(params, state, batch, value, metrics)

    def check_batch(self, batch: BatchLike) -> Batch:
        """Checks a batch, which must have advantages."""
        Batch.of(batch, "advantages")
        return super().check_batch(batch)

    def _policy_and_divergence(
        self, params: Params, reference: RWKV7State, state: RWKV7State, batch: Batch
    ) -> tuple[Scalar, Metrics]:
        """Computes the policy term and the divergence of the completions."""
        inputs = jnp.asarray(batch.inputs)
        x = hidden_states_from(self.model, params, state, inputs)
        # A divergence without weight is only a metric, without a backward pass. It shows how far
        # the state has moved when rewards fall.
        reference_x = hidden_states_from(self.model, params, reference, inputs)
        weights = target_shares(batch, self.model.config.vocab_size)
        # One advantage per row, for all of its tokens.
        advantages = jnp.asarray(batch.advantages, jnp.float32)[:, None]
        policy = weights * advantages
        if batch.importance is not None:
            policy = policy * jnp.asarray(batch.importance, jnp.float32)
        has_ratio = batch.old_logp is not None
        terms = TermWeights(
            # With ratios, the policy term is computed below.
            nats=None if has_ratio else policy,
            kl=self.kl * weights if self.kl else None,
        )
        value, tokenwise = weighted_loss(
            x,
            params["head"]["weight"],
            jnp.asarray(batch.targets),
            terms,
            reference=jax.lax.stop_gradient(reference_x),
            reverse_kl=True,
            temperature=self.temperature,
            entropy=True,
        )
        metrics = {
            "policy_loss": weighted_sum(policy, tokenwise.nats),
            "loss_nats": weighted_sum(weights, tokenwise.nats),
            "kl_nats": weighted_sum(weights, tokenwise.kl),
            "entropy_nats": weighted_sum(weights, tokenwise.entropy),
        }
        if has_ratio:
            log_ratio = -tokenwise.nats - jnp.asarray(batch.old_logp, jnp.float32)
            ratio, is_clipped = _clipped_ratio(log_ratio, advantages, self.bounds)
            metrics["policy_loss"] = -weighted_sum(policy, ratio)
            metrics["clipped"] = weighted_sum(weights, is_clipped)
            value = value + metrics["policy_loss"]
        return value, metrics


def policy_loss(
    model: RWKV7,
    params: Params,
    *,
    temperature: Number = 1.0,
    kl: float = 0.0,
    reference: RWKV7State | None = None,
    leaves: tuple[str, ...] = ("wkv",),
    anchor: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> Loss:
    """Makes the loss `-advantage x log p` of sampled tokens + `kl` x KL(tuned || reference).

    A batch also holds `advantages` [B]. Rows sampled from the current state need no ratio. For rows
    sampled from an older state, `old_logp` [B T] has their log-probabilities under that state, and
    the ratio p / p_old replaces log p. It is clipped at 1 + `epsilon_high` for a positive
    advantage and at 1 - `epsilon_low` for a negative one. An optional `importance` [B T] weights
    each token.

    Both terms are means over all sampled tokens of the batch, not over rows: every token has the
    same weight whatever the length of its row, and microbatches add up to the full batch. The
    divergence is exact, over the full vocabulary, at every sampled position. It is computed even if
    its weight is 0.

    Metrics: `loss_nats` is the mean -log p, `policy_loss` the first term, `entropy_nats` the mean
    entropy of the sampled distributions; `kl_nats`, `anchor_nats`, `state_max`, `state_rms`; with
    `old_logp` also `clipped`, the fraction of tokens whose gradient is 0 because of clipping.

    Args:
        model: the student.
        params: its weights.
        temperature: sampling temperature of the rows, above 0.
        kl: weight of the divergence.
        reference: a start state (batch 1); None for zeros, the model without tuning.
        leaves: the trainable leaves, from `state_tuning.LEAVES`.
        anchor: weight of KL(base || tuned) on `batch.anchor`, unlabelled tokens [B T+1].
        epsilon_low: largest distance of a ratio below 1, at most 1.
        epsilon_high: largest distance of a ratio above 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a leaf is unknown, a weight or bound is out of range, or the temperature is 0.

    Source: PPO's objective, arXiv 1707.06347 equation 7; two bounds, DAPO, arXiv 2503.14476
    equation 10.
    """
    with prefix_errors("policy_loss"):
        check_model(model)
        check_params(params, model.config)
        check_leaves(leaves)
        check_number(kl, 0, math.inf, "`kl`")
        check_number(anchor, 0, math.inf, "`anchor`")
        check_number(temperature, 0, math.inf, "`temperature`", above=True)
        bounds = _log_bounds(epsilon_low, epsilon_high)
        reference = _start_state(reference, model, "reference")
    loss = PolicyLoss(
        model=model,
        temperature=temperature,
        kl=kl,
        leaves=tuple(leaves),
        anchor=anchor,
        bounds=bounds,
    )
    return Partial(loss, params, reference)
