"""Next-token losses of batches, and checks of batches.

A batch is a `data.Batch`, or a mapping of its fields. A loss is a weighted sum over positions whose
weights sum to 1 over the full batch. The gradients of any microbatches therefore sum to the
gradient of the batch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import (
    check_model,
    check_number,
    check_params,
    check_tokens,
    is_known,
    is_traced,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state
from rwkv7_jax.training.head_loss import (
    PerToken,
    TermWeights,
    is_id,
    weighted_loss,
    weighted_sum,
)
from rwkv7_jax.training.shared_pass import hidden_of_batch

Metrics = dict[str, Float[Array, ""]]

# A function of the trainable parameters and a batch. A user's own loss may take another mapping:
# see `make_train_step`.
Loss = Callable[[Any, Any], tuple[Float[Array, ""], Metrics]]


def target_weights(batch: Batch) -> Any:
    """Returns the weights that tell which targets count, at any scale; None if there are none."""
    return batch.mask if batch.weights is None else batch.weights


def loss_weights(batch: Mapping[str, Any]) -> PerToken:
    """Returns each target's share of the loss: the batch's `weights`, or its mask over its sum.

    If no target counts, all shares are 0; see `target_shares`.
    """
    if "weights" in batch:
        return jnp.asarray(batch["weights"])
    mask = jnp.asarray(batch["mask"], jnp.float32)
    total = jnp.sum(mask)
    # Not max(total, 1): a mask of fractions may sum to less than 1.
    return mask / jnp.where(total > 0, total, 1.0)


def target_shares(batch: Mapping[str, Any], vocab_size: int) -> PerToken:
    """Returns `loss_weights`, or NaN for unknown ids and if no target counts.

    A train step skips such a batch, as it skips any non-finite loss.

    Args:
        batch: a batch, or a microbatch with weights.
        vocab_size: as in `shares_of_known_ids`.
    """
    shares = shares_of_known_ids(loss_weights(batch), batch["tokens"], vocab_size)
    # The weights of a microbatch may all be 0: other microbatches have targets.
    if "weights" in batch:
        return shares
    return nan_where_all_zero(shares)


def nan_where_all_zero(shares: PerToken) -> PerToken:
    """Returns the shares of a full batch; NaN if all of them are 0."""
    return jnp.where(jnp.any(shares != 0), shares, jnp.nan)


def check_ids_and_shapes(
    batch: BatchLike, vocab_size: int, name: str = "batch", *, packed: bool = False
) -> Batch:
    """Checks that ids are inside the vocabulary and fields match each other; returns a `Batch`.

    Args:
        batch: the values of traced fields are not checked.
        vocab_size: the size of the model's vocabulary.
        name: the argument's name, for messages.
        packed: whether the caller supports rows of several sequences.

    Raises:
        TypeError: not a batch, or a field of the wrong type.
        ValueError: fields that do not match each other, ids out of range, or rows of fewer than two
            ids.
    """
    batch = Batch.of(batch, name=name, packed=packed)
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
    for field in ("mask", "weights", "advantages", "old_logp", "importance"):
        values = getattr(batch, field)
        if values is None or not is_known(values):
            continue
        values = np.asarray(values)
        if not np.all(np.isfinite(values)):
            raise ValueError(
                f"`{name}.{field}` must be finite; it holds NaN or infinity."
            )
        # A mask with negative entries may sum to 0.
        if field == "mask" and np.any(values < 0):
            raise ValueError(
                f"`{name}.mask` must be at least 0; it holds {np.min(values):g}."
            )
    return batch


def check_targets(batch: Batch, name: str = "batch") -> None:
    """Checks that at least one target counts, if the mask is concrete.

    Raises:
        ValueError: the mask, or the weights, are 0 everywhere.
    """
    field = "mask" if batch.weights is None else "weights"
    values = getattr(batch, field)
    if values is not None and is_known(values) and not np.any(np.asarray(values)):
        raise ValueError(
            f"`{name}.{field}` must be nonzero for at least one target; it is 0 everywhere."
        )


def check_masked_batch(batch: BatchLike, vocab_size: int, name: str = "batch") -> Batch:
    """Checks a batch whose mask must select a target, for callers that ignore `weights`.

    Raises:
        TypeError: as in `check_ids_and_shapes`.
        ValueError: as in `check_ids_and_shapes`, or a mask that is 0 everywhere.
    """
    batch = Batch.of(batch, "mask", name=name).replace(weights=None)
    batch = check_ids_and_shapes(batch, vocab_size, name)
    check_targets(batch, name)
    return batch


def shares_of_known_ids(
    shares: PerToken, tokens: Int[Array | np.ndarray, "B T1"], vocab_size: int
) -> PerToken:
    """Returns the shares, with NaN for targets from the first id out of range on.

    Concrete ids were checked before. A traced id that is out of range is embedded as zeros, so the
    losses of all later targets would be meaningless.

    Args:
        shares: of the targets [B T].
        tokens: one more than the targets.
        vocab_size: the size of the model's vocabulary.
    """
    outside = ~is_id(jnp.asarray(tokens), vocab_size)
    read = jnp.cumsum(outside, axis=1)[:, 1:] > 0
    return jnp.where(read & (shares != 0), jnp.nan, shares)


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
        state: the start state of every row or, in packed rows, of every sequence.
        batch: tokens and mask.
        l2wrap: strength of the pull of each position's largest logit towards zero. Its gradient is
            `l2wrap / (B T)` times that logit, at masked positions too. Official training uses 1e-4.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/model.py:758-771.
    """
    with prefix_errors("next_token_loss"):
        batch = check_ids_and_shapes(batch, model.config.vocab_size, packed=True)
        check_targets(batch)
    loss, (metrics, _) = next_token_loss_with_trace(
        model, params, state, batch, l2wrap=l2wrap
    )
    return loss, metrics


def next_token_loss_with_trace(
    model: RWKV7,
    params: Params,
    state: RWKV7State,
    batch: Batch,
    *,
    l2wrap: float = 0.0,
    names: tuple[str, ...] = (),
) -> tuple[Float[Array, ""], tuple[Metrics, dict[str, Array]]]:
    """Computes `next_token_loss`, its metrics, and the arrays `names` of the model's trace.

    Callers must have checked the batch.
    """
    targets = jnp.asarray(batch.targets)
    shares = target_shares(batch, model.config.vocab_size)
    x, trace = hidden_of_batch(model, params, state, batch, names)
    square = None
    is_pulled = is_traced(l2wrap) or l2wrap != 0
    if is_pulled:
        square = jnp.full(targets.shape, l2wrap / targets.size, jnp.float32)
    weights = TermWeights(nats=shares, square=square)
    loss, statistics = weighted_loss(x, params["head"]["weight"], targets, weights)
    nats = weighted_sum(shares, statistics.nats) if is_pulled else loss
    return loss, ({"loss_nats": nats}, trace)


# Compared by identity, like functions: a number may be an array, which is not hashable.
@dataclasses.dataclass(frozen=True, eq=False)
class _PretrainLoss:
    """The loss of all weights that `pretrain_loss` returns.

    Attributes:
        model: the shell around the weights.
        l2wrap: as in `next_token_loss`.
    """

    model: RWKV7
    l2wrap: float

    def __call__(
        self, params: Params, batch: BatchLike
    ) -> tuple[Float[Array, ""], Metrics]:
        """Computes the loss and its metrics."""
        value, (metrics, _) = self.with_trace(params, batch, ())
        return value, metrics

    def with_trace(self, params: Params, batch: BatchLike, names: tuple[str, ...]):
        """Computes the loss, its metrics, and the arrays `names` of the model's trace."""
        with prefix_errors("pretrain_loss"):
            batch = self.check_batch(batch)
            check_targets(batch)
            check_params(params, self.model.config)
        state = init_state(self.model.config, batch.sequences)
        return next_token_loss_with_trace(
            self.model, params, state, batch, l2wrap=self.l2wrap, names=names
        )

    def check_batch(self, batch: BatchLike) -> Batch:
        """Checks a batch; a step calls it on the host, where ids are concrete."""
        return check_ids_and_shapes(batch, self.model.config.vocab_size, packed=True)


def pretrain_loss(model: RWKV7, *, l2wrap: float = 1e-4) -> Loss:
    """Makes the loss of all weights, with every row or packed sequence starting from zeros.

    Args:
        model: the shell around the weights.
        l2wrap: as in `next_token_loss`.

    Raises:
        TypeError: not a model, or an `l2wrap` that is not a number.
        ValueError: a negative `l2wrap`; from the loss, a batch that does not match the model.
    """
    with prefix_errors("pretrain_loss"):
        check_model(model)
        check_number(l2wrap, 0, math.inf, "`l2wrap`")
    return _PretrainLoss(model, l2wrap)
