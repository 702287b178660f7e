"""Next-token losses that never hold all logits at once.

A batch is a `data.Batch`, or a mapping of its fields. Losses are weighted sums over positions
whose weights add up to 1 over the whole batch, so that micro-batches of any make-up add up to the
same gradient as the batch in one piece.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from rwkv7_jax.array_types import Activations, Params, Tokens
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.model.layers import head_logits
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state

Metrics = dict[str, Float[Array, ""]]

# Of the trainables and a batch. A user's own loss may read a mapping of its own; see
# `make_train_step`.
Loss = Callable[[Any, Any], tuple[Float[Array, ""], Metrics]]

PerToken = Float[Array, "B T"]

# Tokens of a sequence whose logits exist at the same time.
CHUNK = 512


def loss_weights(batch: Mapping[str, Any]) -> PerToken:
    """Each target's share of the loss: the batch's `weights`, else its mask over the mask's sum."""
    if "weights" in batch:
        return jnp.asarray(batch["weights"])
    mask = jnp.asarray(batch["mask"], jnp.float32)
    return mask / jnp.maximum(jnp.sum(mask), 1.0)


def map_token_chunks(per_token, *arrays: Shaped[Array, "B T ..."], chunk: int = CHUNK):
    """`per_token(*pieces)` over pieces of `chunk` tokens, joined; recomputed in the backward pass.

    Args:
        per_token: maps arrays [B C ...] to a tree of arrays [B C].
        *arrays: what is cut along T; zeros fill the last piece.
        chunk: C.
    """
    tokens = arrays[0].shape[1]
    chunk = max(min(chunk, tokens), 1)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -tokens % chunk), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :tokens]

    pieces = jax.lax.map(lambda xs: jax.checkpoint(per_token)(*xs), tuple(map(cut, arrays)))
    return jax.tree.map(join, pieces)


def cross_entropy(
    x: Activations, head: Float[Array, "V D"], targets: Tokens, *, chunk: int = CHUNK
) -> tuple[PerToken, PerToken]:
    """The loss in nats and the largest logit at every position.

    Args:
        x: normed activations, from the model's `hidden`.
        head: its output projection.
        targets: ids.
        chunk: tokens of a sequence whose logits exist at the same time.
    """

    def per_token(x, targets):
        logits = head_logits(x, head)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.max(logits, axis=-1)

    return map_token_chunks(per_token, x, targets, chunk=chunk)


def kl_divergence(
    x: Activations,
    base: Float[Array, "B T E"],
    head: Float[Array, "V D"],
    *,
    base_head: Float[Array, "V E"] | None = None,
    chunk: int = CHUNK,
) -> PerToken:
    """KL(base || tuned) in nats at every position.

    Args:
        x: normed activations of the tuned model, from its `hidden`.
        base: those of the base model.
        head: the tuned model's output projection.
        base_head: the base model's, if it has another.
        chunk: as in `cross_entropy`.
    """
    base_head = head if base_head is None else base_head

    def per_token(x, base):
        tuned = jax.nn.log_softmax(head_logits(x, head))
        reference = jax.nn.log_softmax(head_logits(base, base_head))
        return jnp.sum(jnp.exp(reference) * (reference - tuned), axis=-1)

    return map_token_chunks(per_token, x, base, chunk=chunk)


def next_token_loss(
    model: RWKV7, params: Params, state: RWKV7State, batch: BatchLike, *, l2wrap: float = 0.0
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted cross entropy plus L2Wrap's penalty; the metrics report the cross entropy alone.

    Args:
        model: the shell around `params`.
        params: all weights.
        state: what every row starts from.
        batch: tokens and mask.
        l2wrap: pull of the largest logit of every position towards zero; its gradient is
            `l2wrap / (B T)` times that logit, masked positions included. Official training uses
            1e-4.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/model.py:758-771.
    """
    batch = Batch.of(batch, caller="next_token_loss")
    tokens = jnp.asarray(batch.tokens)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x, _ = model.apply({"params": params}, inputs, state, method="hidden")
    nats, largest = cross_entropy(x, params["head"]["weight"], targets)
    loss = jnp.sum(loss_weights(batch) * nats)
    return loss + 0.5 * l2wrap * jnp.mean(jnp.square(largest)), {"loss_nats": loss}


def pretrain_loss(model: RWKV7, *, l2wrap: float = 1e-4) -> Loss:
    """The loss as a function of all weights; every row starts from the zero state."""

    def loss(params: Params, batch: BatchLike):
        batch = Batch.of(batch, caller="pretrain_loss")
        state = init_state(model.config, batch.tokens.shape[0])
        return next_token_loss(model, params, state, batch, l2wrap=l2wrap)

    return loss
