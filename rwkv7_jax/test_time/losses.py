"""Losses of the start state alone: imitate a guide, prefer what a reward prefers.

Both read completions: batches of `tokens` [B T+1] and `mask` [B T], above 0 where the target was
drawn. The weights are frozen; the state has batch 1 and every row starts from it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rwkv7_jax.array_types import Params
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.generation.sampling import Number
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, check_state, init_state
from rwkv7_jax.training.losses import Loss, loss_weights, token_statistics
from rwkv7_jax.tuning.state_tuning import (
    add_anchor_and_metrics,
    check_leaves,
    hidden_states_from,
    stop_gradient_except,
)


def _check(caller: str, leaves: tuple[str, ...], **weights: Number) -> None:
    check_leaves(leaves, caller=caller)
    for name, value in weights.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{caller}: `{name}` must be finite and at least 0; got {value}.")


def distillation_loss(
    model: RWKV7,
    params: Params,
    *,
    guide: RWKV7 | None = None,
    guide_params: Params | None = None,
    guide_state: RWKV7State | None = None,
    imitation: float = 1.0,
    kl: float = 1.0,
    leaves: tuple[str, ...] = ("wkv",),
    anchor: float = 0.0,
) -> Loss:
    """`imitation` x cross entropy of completions, plus `kl` x KL(guide || student) with a guide.

    Both are means over completions' tokens, each with its trace's weight. The guide reads the same
    rows as the student, behind `guide_state`. Metrics: `loss_nats` is the cross entropy, `kl_nats`
    the divergence, `anchor_nats`, `state_max` and `state_rms` as in `state_tuning.state_loss`.

    Args:
        model: the student.
        params: its weights.
        guide: a model with the same vocabulary; None learns from the completions alone.
        guide_params: its weights.
        guide_state: what the guide's rows start from (batch 1); None is zeros.
        imitation: weight of the completions' cross entropy.
        kl: weight of the divergence.
        leaves: what is tuned, of `state_tuning.LEAVES`.
        anchor: weight of KL(base || tuned) on `batch.anchor`, unlabelled tokens [B T+1].

    Raises:
        ValueError: vocabularies differ, a guide without weights or the reverse, an unknown leaf, a
            negative weight.
    """
    _check("distillation_loss", leaves, imitation=imitation, kl=kl, anchor=anchor)
    guide_state = _check_guide(model, guide, guide_params, guide_state)

    def loss(params: Params, guide_params, guide_state, state: RWKV7State, batch: BatchLike):
        batch = Batch.of(batch, caller="distillation_loss")
        state = stop_gradient_except(state, tuple(leaves))
        tokens, weights = jnp.asarray(batch.tokens), loss_weights(batch)
        inputs, targets, head = tokens[:, :-1], tokens[:, 1:], params["head"]["weight"]
        x = hidden_states_from(model, params, state, inputs)
        if guide is None:
            nats = jnp.sum(weights * token_statistics(x, head, targets).nats)
            value, metrics = imitation * nats, {"loss_nats": nats}
        else:
            wanted = jax.lax.stop_gradient(
                hidden_states_from(guide, guide_params, guide_state, inputs)
            )
            found = token_statistics(
                x,
                head,
                targets,
                reference=wanted,
                reference_head=guide_params["head"]["weight"],
            )
            nats = jnp.sum(weights * found.nats)
            apart = jnp.sum(weights * found.kl)
            value, metrics = imitation * nats + kl * apart, {"loss_nats": nats, "kl_nats": apart}
        return add_anchor_and_metrics(
            model, params, state, batch, anchor=anchor, value=value, metrics=metrics
        )

    return Partial(loss, params, guide_params, guide_state)


def _check_guide(model, guide, guide_params, guide_state) -> RWKV7State | None:
    """The state that the guide starts from, if there is a guide."""
    caller = "distillation_loss"
    if (guide is None) != (guide_params is None):
        missing = "guide" if guide is None else "guide_params"
        raise ValueError(f"{caller}: `guide` and `guide_params` go together; `{missing}` is None.")
    if guide is None:
        if guide_state is not None:
            raise ValueError(f"{caller}: `guide_state` needs a `guide`; got None.")
        return None
    ours, theirs = model.config.vocab_size, guide.config.vocab_size
    if ours != theirs:
        raise ValueError(f"{caller}: `guide` must have the student's {ours} ids; got {theirs}.")
    guide_state = init_state(guide.config) if guide_state is None else guide_state
    check_state(guide_state, 1, guide.config, caller=f"{caller}: `guide_state`")
    return guide_state


def context_distillation(
    model: RWKV7, params: Params, context: RWKV7State, *, leaves: tuple[str, ...] = ("wkv",)
) -> Loss:
    """KL(the model behind `context` || the model from its start state): a prompt becomes a state.

    A long prompt is read once: `context = generate(model, params, ids, tokens=0).state`. Rows are
    any text that may follow it, best what the model itself writes there:
    `collect(model, params, prompts, state=context, ...)`.

    Args:
        model: guide and student.
        params: its weights.
        context: the state behind the prompt (batch 1).
        leaves: what is tuned, of `state_tuning.LEAVES`.
    """
    return distillation_loss(
        model,
        params,
        guide=model,
        guide_params=params,
        guide_state=context,
        imitation=0.0,
        leaves=leaves,
    )


def policy_loss(
    model: RWKV7,
    params: Params,
    *,
    temperature: Number = 1.0,
    kl: float = 0.0,
    reference: RWKV7State | None = None,
    leaves: tuple[str, ...] = ("wkv",),
    anchor: float = 0.0,
) -> Loss:
    """`-advantage x log p` of what was drawn, plus `kl` x KL(tuned || reference).

    A batch also holds `advantages` [B]. Its rows were drawn from the very state that is
    differentiated, so there is no ratio and nothing to clip: one update a batch. Both terms are
    means over all drawn tokens of the batch, not over each row's: every token then weighs the
    same however long its row is, and pieces of a batch add up to the whole. The divergence is
    exact, over the whole vocabulary, at every drawn position. Metrics: `loss_nats` is the mean
    -log p, `policy_loss` the first term, `kl_nats`, `anchor_nats`, `state_max`, `state_rms`.

    Args:
        model: the student.
        params: its weights.
        temperature: at which the rows were drawn, above 0.
        kl: weight of the divergence.
        reference: a start state (batch 1); None is zeros, the model that was not tuned.
        leaves: what is tuned, of `state_tuning.LEAVES`.
        anchor: weight of KL(base || tuned) on `batch.anchor`, unlabelled tokens [B T+1].

    Raises:
        ValueError: an unknown leaf, a negative weight or a temperature of 0.
    """
    caller = "policy_loss"
    _check(caller, leaves, kl=kl, anchor=anchor, temperature=temperature)
    if temperature <= 0:
        raise ValueError(f"{caller}: `temperature` must be above 0; got {temperature}.")
    reference = init_state(model.config) if reference is None else reference
    check_state(reference, 1, model.config, caller=f"{caller}: `reference`")

    def loss(params: Params, reference: RWKV7State, state: RWKV7State, batch: BatchLike):
        batch = Batch.of(batch, "advantages", caller=caller)
        state = stop_gradient_except(state, tuple(leaves))
        tokens, weights = jnp.asarray(batch.tokens), loss_weights(batch)
        hidden = functools.partial(hidden_states_from, model, params, tokens=tokens[:, :-1])
        x = hidden(state)
        found = token_statistics(
            x,
            params["head"]["weight"],
            tokens[:, 1:],
            reference=jax.lax.stop_gradient(hidden(reference)) if kl else None,
            reverse_kl=True,
            temperature=temperature,
        )
        logp = -found.nats
        advantages = jnp.asarray(batch.advantages, jnp.float32)[:, None]
        value, nats = -jnp.sum(weights * advantages * logp), -jnp.sum(weights * logp)
        metrics = {"policy_loss": value, "loss_nats": nats}
        if kl:
            drift = jnp.sum(weights * found.kl)
            value, metrics = value + kl * drift, metrics | {"kl_nats": drift}
        return add_anchor_and_metrics(
            model, params, state, batch, anchor=anchor, value=value, metrics=metrics
        )

    return Partial(loss, params, reference)
