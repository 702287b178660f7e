"""Losses of the start state alone: imitation of a teacher, and policy gradients.

Both read completions: batches of `tokens` [B T+1] and `mask` [B T], above 0 where the target was
drawn. The weights are frozen; the state has batch 1 and every row starts from it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import Activations, Params
from rwkv7_jax.checks import (
    check_instance,
    check_model,
    check_number,
    check_params,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.generation.sampling import Number
from rwkv7_jax.model.int8_weights import Weight
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
    """The loss that `distillation_loss` makes, called with the frozen arrays in front.

    Weights are arguments: jit would compile closed-over arrays in as constants.

    Attributes:
        teacher: the shell around the teacher's weights, if there is one.
        imitation: weight of the completions' cross entropy.
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
        if self.teacher is None:
            value, metrics = self._cross_entropy(params, state, batch)
        else:
            assert teacher_params is not None and teacher_state is not None
            teacher_x = hidden_states_from(
                self.teacher, teacher_params, teacher_state, jnp.asarray(batch.inputs)
            )
            # Frozen like the student's weights; only the student's state is differentiated.
            teacher_x = jax.lax.stop_gradient(teacher_x)
            teacher_head = teacher_params["head"]["weight"]
            value, metrics = self._cross_entropy_and_divergence(
                params, state, batch, teacher_x, teacher_head
            )
        return self.with_anchor(params, state, batch, value, metrics)

    def _cross_entropy(
        self, params: Params, state: RWKV7State, batch: Batch
    ) -> tuple[Scalar, Metrics]:
        weights = target_shares(batch, self.model.config.vocab_size)
        nats, _ = weighted_loss(
            hidden_states_from(self.model, params, state, jnp.asarray(batch.inputs)),
            params["head"]["weight"],
            jnp.asarray(batch.targets),
            TermWeights(nats=weights),
        )
        return self.imitation * nats, {"loss_nats": nats}

    def _cross_entropy_and_divergence(
        self,
        params: Params,
        state: RWKV7State,
        batch: Batch,
        teacher_x: Activations,
        teacher_head: Weight,
    ) -> tuple[Scalar, Metrics]:
        weights = target_shares(batch, self.model.config.vocab_size)
        value, tokenwise = weighted_loss(
            hidden_states_from(self.model, params, state, jnp.asarray(batch.inputs)),
            params["head"]["weight"],
            jnp.asarray(batch.targets),
            TermWeights(nats=self.imitation * weights, kl=self.kl * weights),
            reference=teacher_x,
            reference_head=teacher_head,
        )
        metrics = {
            "loss_nats": weighted_sum(weights, tokenwise.nats),
            "kl_nats": weighted_sum(weights, tokenwise.kl),
        }
        return value, metrics


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
    """Makes `imitation` x cross entropy of completions + `kl` x KL(teacher || student).

    Both terms are means over the tokens of completions, each with its trace's weight; the second
    one needs a teacher. The teacher reads the same rows as the student, after `teacher_state`.
    Metrics: `loss_nats` is the cross entropy, `kl_nats` the divergence; `anchor_nats`, `state_max`
    and `state_rms` as in `state_tuning.state_loss`.

    Args:
        model: the student.
        params: its weights.
        teacher: a model with the same vocabulary; None learns from the completions alone.
        teacher_params: its weights.
        teacher_state: where the teacher's rows start (batch 1); None is zeros.
        imitation: weight of the completions' cross entropy.
        kl: weight of the divergence.
        leaves: the trainable parameters, of `state_tuning.LEAVES`.
        anchor: weight of KL(base || tuned) on `batch.anchor`, unlabelled tokens [B T+1].

    Raises:
        ValueError: vocabularies differ, a teacher without weights or weights without a teacher, an
            unknown leaf, a negative weight.
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
    """Checks the teacher; returns the state it starts from, None where there is no teacher."""
    if (teacher is None) != (teacher_params is None):
        missing = "teacher" if teacher is None else "teacher_params"
        raise ValueError(
            f"`teacher` and `teacher_params` go together; `{missing}` is None."
        )
    if teacher is None:
        if teacher_state is not None:
            raise ValueError("`teacher_state` needs a `teacher`; got None.")
        return None
    check_model(teacher, "`teacher`")
    ours = model.config.vocab_size
    theirs = teacher.config.vocab_size
    if ours != theirs:
        raise ValueError(f"`teacher` must have the student's {ours} ids; got {theirs}.")
    check_params(teacher_params, teacher.config, "`teacher_params`")
    return _start_state(teacher_state, teacher, "teacher_state")


def _start_state(state: RWKV7State | None, model: RWKV7, argument: str) -> RWKV7State:
    """Checks a start state of the argument's name; None becomes zeros."""
    if state is None:
        return init_state(model.config)
    try:
        # Batch 1: every row starts from it.
        check_state(state, 1, model.config)
    except (TypeError, ValueError) as error:
        # The check speaks of `state`; the message says which argument that is.
        raise type(error)(f"`{argument}`: {error}") from None
    return state


def context_distillation(
    model: RWKV7,
    params: Params,
    context: RWKV7State,
    *,
    leaves: tuple[str, ...] = ("wkv",),
) -> Loss:
    """Makes KL(the model after `context` || the model from its start state).

    So a prompt becomes a state. A long prompt is read once:
    `context = generate(model, params, ids, tokens=0).state`. Rows are any text that may follow it,
    best text that the model itself writes there:
    `collect_traces(model, params, prompts, state=context, ...)`.

    Args:
        model: teacher and student.
        params: its weights.
        context: the state after the prompt (batch 1).
        leaves: the trainable parameters, of `state_tuning.LEAVES`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: weights or a context of another model, or an unknown leaf.
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
    """Returns the bounds of a ratio in the logarithm, in which no ratio can overflow."""
    check_number(epsilon_low, 0, 1, "`epsilon_low`")
    check_number(epsilon_high, 0, math.inf, "`epsilon_high`")
    low = -math.inf if epsilon_low == 1 else math.log1p(-epsilon_low)
    return low, math.log1p(epsilon_high)


def _clipped_ratio(
    log_ratio: PerToken,
    advantages: Float[Array, "B 1"],
    bounds: tuple[float, float],
) -> tuple[PerToken, PerToken]:
    """Bounds ratios from the side on which more would be earned; tells which were bounded."""
    low, high = bounds
    # Not by a minimum, which at the bound itself would halve the gradient.
    is_clipped = jnp.where(advantages > 0, log_ratio > high, log_ratio < low)
    bound = jnp.where(advantages > 0, high, low)
    ratio = jnp.exp(jnp.where(is_clipped, bound, log_ratio))
    # Without an advantage there is no gradient that a bound could stop.
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
        model: static.
        params: its weights.
        state: where every row starts (batch 1).
        tokens: of the rows.
        temperature: at which they were drawn.
    """
    tokens = jnp.asarray(tokens)
    hidden = hidden_states_from(model, params, state, tokens[:, :-1])
    statistics = token_statistics(
        hidden, params["head"]["weight"], tokens[:, 1:], temperature=temperature
    )
    return -statistics.nats


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyLoss(StartStateLoss):
    """The loss that `policy_loss` makes, called with the frozen arrays in front.

    Attributes:
        temperature: at which the rows were drawn.
        kl: weight of the divergence.
        bounds: of the logarithm of a ratio.
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
        """Computes the terms that all rows of completions have."""
        inputs = jnp.asarray(batch.inputs)
        x = hidden_states_from(self.model, params, state, inputs)
        # Measured even where it has no weight: how far the state has moved is the first thing to
        # look at when rewards fall. It has no backward pass then.
        reference_x = hidden_states_from(self.model, params, reference, inputs)
        weights = target_shares(batch, self.model.config.vocab_size)
        # One number for each row, for all of its tokens.
        advantages = jnp.asarray(batch.advantages, jnp.float32)[:, None]
        policy = weights * advantages
        if batch.importance is not None:
            policy = policy * jnp.asarray(batch.importance, jnp.float32)
        has_ratio = batch.old_logp is not None
        terms = TermWeights(
            # How much a token weighs depends on its own ratio: that term comes afterwards.
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
    """Makes `-advantage x log p` of the drawn tokens + `kl` x KL(tuned || reference).

    A batch also holds `advantages` [B]. Where its rows were drawn from the very state that is
    differentiated, there is no ratio and nothing to clip. Where they are older, `old_logp` [B T]
    has the log-probabilities of that time, and in place of log p stands the ratio p / p_old, up to
    1 + `epsilon_high` where the advantage is positive and down to 1 - `epsilon_low` where it is
    negative. `importance` [B T], if it is there, weighs each token.

    Both terms are means over all drawn tokens of the batch, not over each row's: every token then
    weighs the same however long its row is, and pieces of a batch add up to the full batch. The
    divergence is exact, over the full vocabulary, at every drawn position, and measured whatever
    its weight is. Metrics: `loss_nats` is the mean -log p, `policy_loss` the first term,
    `entropy_nats` the mean entropy of the draws; `kl_nats`, `anchor_nats`, `state_max`,
    `state_rms`; with `old_logp` also `clipped`, the share of tokens whose gradient is 0 because of
    the bounds.

    Args:
        model: the student.
        params: its weights.
        temperature: at which the rows were drawn, above 0.
        kl: weight of the divergence.
        reference: a start state (batch 1); None is zeros, the model without tuning.
        leaves: the trainable parameters, of `state_tuning.LEAVES`.
        anchor: weight of KL(base || tuned) on `batch.anchor`, unlabelled tokens [B T+1].
        epsilon_low: how far below 1 a ratio counts, at most 1.
        epsilon_high: how far above 1.

    Raises:
        ValueError: an unknown leaf, a negative weight or bound, or a temperature of 0.

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
