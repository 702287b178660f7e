"""Next-token losses that never hold all logits at once.

A batch is a `data.Batch`, or a mapping of its fields. Losses are weighted sums over positions
whose weights add up to 1 over the whole batch, so that micro-batches of any make-up add up to the
same gradient as the batch in one piece.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped

from rwkv7_jax.array_types import Activations, Params, Tokens
from rwkv7_jax.checks import (
    check_model,
    check_number,
    check_params,
    check_tokens,
    is_known,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.model.int8_weights import Int8Matrix, Weight
from rwkv7_jax.model.layers import head_logits
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state

Metrics = dict[str, Float[Array, ""]]

# Of the trainable parameters and a batch. A user's own loss may read a mapping of its own; see
# `make_train_step`.
Loss = Callable[[Any, Any], tuple[Float[Array, ""], Metrics]]

PerToken = Float[Array, "B T"]

# Tokens of a sequence whose logits exist at the same time.
CHUNK = 512


def loss_weights(batch: Mapping[str, Any]) -> PerToken:
    """Returns each target's share of the loss: the batch's `weights`, or its mask over the sum.

    Where no target counts the shares are 0; see `target_shares`.
    """
    if "weights" in batch:
        return jnp.asarray(batch["weights"])
    mask = jnp.asarray(batch["mask"], jnp.float32)
    total = jnp.sum(mask)
    # Not the larger of it and 1: a mask of fractions may add up to less, and still has a mean.
    return mask / jnp.where(total > 0, total, 1.0)


def target_shares(batch: Mapping[str, Any]) -> PerToken:
    """Returns `loss_weights`, or NaN where no target counts: a mean over nothing is no number.

    A train step leaves such a batch out, as it does any loss that is not finite.
    """
    shares = loss_weights(batch)
    # The weights of a piece of a batch may be 0 everywhere: other pieces have targets.
    if "weights" in batch:
        return shares
    return nan_where_all_zero(shares)


def nan_where_all_zero(shares: PerToken) -> PerToken:
    """Returns the shares of a batch that is no piece of another one; NaN if all of them are 0."""
    return jnp.where(jnp.any(shares != 0), shares, jnp.nan)


def check_ids_and_shapes(
    batch: BatchLike, vocab_size: int, name: str = "batch"
) -> Batch:
    """Returns a batch whose ids lie inside the vocabulary and whose fields fit each other.

    Args:
        batch: the values of traced fields are not known, and pass.
        vocab_size: the number of ids that the model has.
        name: the argument's name, for messages.

    Raises:
        TypeError: no batch, or a field of the wrong kind.
        ValueError: fields that do not fit each other, ids out of range, or rows without a target.
    """
    batch = Batch.of(batch, name=name)
    if batch.mask is None and batch.weights is None:
        raise ValueError(
            f"`{name}` must hold 'mask' or 'weights'; it has {', '.join(batch)}."
        )
    for field in ("tokens", "anchor"):
        ids = getattr(batch, field)
        if ids is None:
            continue
        shape = tuple(ids.shape)
        if 0 in shape or shape[-1] < 2:
            raise ValueError(
                f"`{name}.{field}` must be rows of two ids or more; got shape {shape}."
            )
        check_tokens(ids, vocab_size, f"`{name}.{field}`")
    for field in ("mask", "weights", "advantages"):
        values = getattr(batch, field)
        if values is None or not is_known(values):
            continue
        values = np.asarray(values)
        if not np.all(np.isfinite(values)):
            raise ValueError(
                f"`{name}.{field}` must be finite; it holds NaN or an infinity."
            )
        # Masks that add up to 0 have no mean, and negative ones may.
        if field == "mask" and np.any(values < 0):
            raise ValueError(
                f"`{name}.mask` must be at least 0; it holds {np.min(values):g}."
            )
    return batch


def check_targets(batch: Batch, name: str = "batch") -> None:
    """Checks that a target counts, where the mask can be read here.

    Raises:
        ValueError: the mask, or the weights, are 0 everywhere.
    """
    field = "mask" if batch.weights is None else "weights"
    values = getattr(batch, field)
    if values is not None and is_known(values) and not np.any(np.asarray(values)):
        raise ValueError(
            f"`{name}.{field}` must count a target; it is 0 everywhere, and a mean over "
            "nothing is no number."
        )


def check_masked_batch(batch: BatchLike, vocab_size: int, name: str = "batch") -> Batch:
    """Returns a batch whose mask counts a target, for readers that look at no `weights`.

    Raises:
        TypeError: as `check_ids_and_shapes`.
        ValueError: as `check_ids_and_shapes`, or a mask that is 0 everywhere.
    """
    batch = Batch.of(batch, "mask", name=name).replace(weights=None)
    batch = check_ids_and_shapes(batch, vocab_size, name)
    check_targets(batch, name)
    return batch


def map_token_chunks(per_token, *arrays: Shaped[Array, "B T ..."], chunk: int = CHUNK):
    """Applies `per_token` to chunks of the sequence one after the other, and joins the results.

    A chunk's intermediate values are not stored but computed again in the backward pass.

    Args:
        per_token: maps arrays [B C ...] to a tree of arrays [B C].
        *arrays: arrays to cut along T; zeros fill the last chunk.
        chunk: C.
    """
    tokens = arrays[0].shape[1]
    chunk = max(min(chunk, tokens), 1)

    # [B T ...] -> [chunks B C ...], the layout that `lax.map` walks through.
    def cut(x):
        padding = ((0, 0), (0, -tokens % chunk), *((0, 0),) * (x.ndim - 2))
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :tokens]

    # Without the checkpoint, the scan of the backward pass would store every chunk's logits.
    per_chunk = jax.checkpoint(per_token)
    chunks = tuple(cut(x) for x in arrays)
    results = jax.lax.map(lambda xs: per_chunk(*xs), chunks)
    return jax.tree.map(join, results)


class TokenStatistics(NamedTuple):
    """Statistics of the predictions at every position.

    Attributes:
        nats: cross entropy of the target; None without targets.
        correct: whether the target has the largest logit; None without targets.
        largest: the largest logit.
        kl: divergence between the model and the reference in nats; None without a reference.
        entropy: of the prediction in nats, at the temperature of `nats`; None unless asked for.
    """

    # PerToken, bool and PerToken where they are there; a caller knows it from its own arguments.
    nats: Any
    correct: Any
    largest: PerToken
    kl: Any
    entropy: Any


def _cross_entropy(logits, targets):
    # A gather of one logit and a logsumexp: `log_softmax` would make another array as large as all
    # logits.
    return jax.nn.logsumexp(logits, axis=-1) - _chosen(logits, targets)


def _is_id(targets, vocab_size: int):
    """Tells which targets are ids; a gather would take a negative one from the end."""
    return (targets >= 0) & (targets < vocab_size)


def _kl_divergence(logp, logq):
    """Computes KL(p || q) over the vocabulary."""
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


def _chosen(values: Float[Array, "... V"], targets: Int[Array, "..."]) -> Array:
    """Picks the value of each target from the vocabulary's axis."""
    return jnp.take_along_axis(values, targets[..., None], axis=-1)[..., 0]


def _entropy(
    logits: Float[Array, "B T V"], temperature: ArrayLike | None
) -> Float[Array, "B T"]:
    """Computes the entropy of softmax(logits / temperature), in nats."""
    scaled = logits if temperature is None else logits / temperature
    logp = jax.nn.log_softmax(scaled)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def token_statistics(
    hidden: Activations,
    head: Weight,
    targets: Tokens | None,
    *,
    reference: Float[Array, "B T E"] | None = None,
    reference_head: Float[Array, "V E"] | Int8Matrix | None = None,
    reverse_kl: bool = False,
    temperature: ArrayLike | None = None,
    entropy: bool = False,
    chunk: int = CHUNK,
) -> TokenStatistics:
    """Computes loss, accuracy and divergence per token, without holding the logits of all tokens.

    Fields that a caller does not use cost nothing in the forward pass: XLA removes them.

    Args:
        hidden: normed activations, from the model's `hidden`.
        head: its output projection.
        targets: ids; None for the divergence alone. One that is out of range has no loss, 0 nats,
            and is never correct.
        reference: normed activations of another model, or of this one from another state.
        reference_head: the reference's output projection, if it is not `head`.
        reverse_kl: whether the divergence is KL(model || reference) in place of
            KL(reference || model).
        temperature: of the distribution in which the targets' `nats` are measured; None for 1. The
            divergence is always that at 1.
        entropy: whether the entropy is computed as well.
        chunk: tokens of a sequence whose logits exist at the same time.
    """
    reference_head = head if reference_head is None else reference_head
    # Absent inputs are absent from the tuple: a None cannot be cut along T.
    arrays = {"hidden": hidden, "targets": targets, "reference": reference}
    given = {name: jnp.asarray(x) for name, x in arrays.items() if x is not None}

    def per_token(*chunks):
        x = dict(zip(given, chunks, strict=True))
        logits = head_logits(x["hidden"], head)
        nats = None
        correct = None
        kl = None
        if reference is not None:
            logp = jax.nn.log_softmax(logits)
            reference_logp = jax.nn.log_softmax(
                head_logits(x["reference"], reference_head)
            )
            kl = (
                _kl_divergence(logp, reference_logp)
                if reverse_kl
                else _kl_divergence(reference_logp, logp)
            )
        if targets is not None:
            correct = jnp.argmax(logits, axis=-1) == x["targets"]
            if temperature is not None:
                nats = -_chosen(jax.nn.log_softmax(logits / temperature), x["targets"])
            elif reference is not None:
                # The normalised logits of the divergence serve both.
                nats = -_chosen(logp, x["targets"])
            else:
                nats = _cross_entropy(logits, x["targets"])
            nats = jnp.where(_is_id(x["targets"], logits.shape[-1]), nats, 0)
        spread = _entropy(logits, temperature) if entropy else None
        return TokenStatistics(nats, correct, jnp.max(logits, axis=-1), kl, spread)

    return map_token_chunks(per_token, *given.values(), chunk=chunk)


def next_token_loss(
    model: RWKV7,
    params: Params,
    state: RWKV7State,
    batch: BatchLike,
    *,
    l2wrap: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """Computes the weighted cross entropy plus L2Wrap's penalty.

    The metric `loss_nats` is the cross entropy alone.

    Args:
        model: the shell around `params`.
        params: all weights.
        state: the start state of every row.
        batch: tokens and mask.
        l2wrap: pull of the largest logit of every position towards zero; its gradient is
            `l2wrap / (B T)` times that logit, masked positions included. Official training uses
            1e-4.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/model.py:758-771.
    """
    with prefix_errors("next_token_loss"):
        batch = check_ids_and_shapes(batch, model.config.vocab_size)
        check_targets(batch)
    tokens = jnp.asarray(batch.tokens)
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:]
    x, _ = model.apply({"params": params}, inputs, state, method="hidden")
    statistics = token_statistics(x, params["head"]["weight"], targets)
    loss = jnp.sum(target_shares(batch) * statistics.nats)
    penalty = 0.5 * l2wrap * jnp.mean(jnp.square(statistics.largest))
    return loss + penalty, {"loss_nats": loss}


def pretrain_loss(model: RWKV7, *, l2wrap: float = 1e-4) -> Loss:
    """Makes the loss of all weights, in which every row starts from the zero state.

    Args:
        model: the shell around the weights.
        l2wrap: as in `next_token_loss`.

    Raises:
        TypeError: not a model, or a weight that is no number.
        ValueError: a negative weight; from the loss, a batch that does not fit the model.
    """
    with prefix_errors("pretrain_loss"):
        check_model(model)
        check_number(l2wrap, 0, math.inf, "`l2wrap`")
    check = functools.partial(check_ids_and_shapes, vocab_size=model.config.vocab_size)

    def loss(params: Params, batch: BatchLike):
        with prefix_errors("pretrain_loss"):
            batch = check(batch)
            check_targets(batch)
            check_params(params, model.config)
        state = init_state(model.config, batch.tokens.shape[0])
        return next_token_loss(model, params, state, batch, l2wrap=l2wrap)

    # A step looks at its batches on the host with this, where ids can still be read.
    loss.check_batch = check  # pyright: ignore[reportFunctionMemberAccess]
    return loss
