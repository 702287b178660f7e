"""The gradient of a batch, with gradient accumulation, and the statistics for the optimizer."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr
from jax.tree_util import Partial
from jaxtyping import Array, Float

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.sharding import constrain_rows
from rwkv7_jax.sharding.layout import path_name
from rwkv7_jax.training.head_loss import PerToken, add_term, zero_sum
from rwkv7_jax.training.losses import Metrics, loss_weights, nan_where_all_zero
from rwkv7_jax.training.shared_pass import reads_most_rows

Scalar = Float[Array, ""]


class LossWithTotals(Protocol):
    """A loss with terms that a microbatch cannot compute from its own rows.

    A sum over targets is no such term: `loss_weights` are shares of the batch. A variance over
    rows, or a mean over positions other than the targets, is one.
    """

    def __call__(self, *arguments: Any, totals: Any = None) -> tuple[Any, Metrics]:
        """Computes the loss; `totals` is None without gradient accumulation."""
        ...

    def batch_totals(self, *arguments: Any) -> Any:
        """Computes the values that every microbatch needs, from the frozen arguments and the batch.

        The batch has `weights`, and its arrays have an additional leading axis of microbatches.
        """
        ...


class Gradients(NamedTuple):
    """The results for a batch.

    Attributes:
        loss: of the batch.
        metrics: of the loss.
        gradients: a tree like the parameters.
        statistics: for the optimizer, or None.
    """

    loss: Scalar
    metrics: Metrics
    gradients: Any
    statistics: Any


def compute_gradients(
    loss: Partial,
    statistics: Partial | None,
    params: Any,
    batch: Mapping[str, Any],
    *,
    accumulate: int,
    share_pass: bool,
) -> Gradients:
    """Computes the loss, its gradient and the statistics of a batch.

    Args:
        loss: `(params, batch) -> (loss, metrics)`.
        statistics: `(params, batch) -> stats` for the optimizer, or None.
        params: the trainable parameters.
        batch: its rows.
        accumulate: microbatches of the batch.
        share_pass: whether the statistics can be read from the loss's forward pass; see
            `can_share_pass`. It is done only where `reads_most_rows`.

    Raises:
        ValueError: rows that `accumulate` does not divide, or a loss that divides by a microbatch's
            mask.
    """
    if statistics is None:
        (value, metrics), grads = _gradients(loss, params, batch, accumulate)
        return Gradients(value, metrics, grads, None)
    if share_pass and reads_most_rows(statistics, batch["tokens"].shape[0]):
        (value, metrics), grads, trace = _gradients_with_trace(
            loss, params, batch, statistics.func.names
        )
        stats = statistics.func.of_trace(*statistics.args, params, batch, trace)
        return Gradients(value, metrics, grads, stats)
    (value, metrics), grads = _gradients(loss, params, batch, accumulate)
    return Gradients(value, metrics, grads, statistics(params, batch))


def cut_rows(batch: Any, accumulate: int) -> Any:
    """Splits the rows of every array into `accumulate` microbatches, along a new leading axis."""

    def cut(array):
        return array.reshape(accumulate, -1, *array.shape[1:])

    return constrain_rows(jax.tree.map(cut, batch), axis=1)


def with_weights(batch: Mapping[str, Any], weights: PerToken) -> Mapping[str, Any]:
    """Returns a batch with its weights replaced."""
    # A mapping may have other names, for a user's loss, so it stays a mapping.
    if isinstance(batch, Batch):
        return batch.replace(weights=weights)
    return {**batch, "weights": weights}


def _check_rows(batch: Any, accumulate: int) -> None:
    rows = batch["tokens"].shape[0]
    if rows % accumulate:
        raise ValueError(
            f"make_train_step: `accumulate` must divide the batch of {rows} rows; got {accumulate}."
        )
    if accumulate == 1:
        # The loss gets the batch as it is, so a user's own arrays need no rows.
        return
    check_divisible(batch, accumulate, "make_train_step", "`accumulate`")


def check_divisible(batch: Any, pieces: int, caller: str, number: str) -> None:
    """Checks that the rows of every array of a batch can be cut into pieces of equal size.

    Args:
        batch: its rows.
        pieces: the number of pieces.
        caller: the public function's name, for messages.
        number: what the number of pieces is, for messages.

    Raises:
        ValueError: an array without rows, or with rows that the number does not divide.
    """
    for path, array in jax.tree_util.tree_leaves_with_path(batch):
        name = path_name(path)
        if not array.ndim:
            raise ValueError(
                f"{caller}: the batch's {name} must have rows, which {number} divides; got a "
                "single number."
            )
        if array.shape[0] % pieces:
            raise ValueError(
                f"{caller}: {number} must divide the {array.shape[0]} rows of the batch's {name}; "
                f"got {pieces}."
            )


def _check_reads_weights(jaxpr: Any, microbatch: Any) -> None:
    """Raises for a loss that reads a microbatch's mask but not its weights.

    Such a loss divides by the microbatch's number of targets, and the mean over microbatches is not
    the batch's loss. A loss that reads neither averages over all positions, which is correct.
    """
    names = [
        path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(microbatch)
    ]
    # Dead code elimination looks into compiled functions inside the loss, which may not read all of
    # their arguments.
    _, is_used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    # The microbatch is the last argument.
    is_read = dict(zip(names, is_used[len(is_used) - len(names) :], strict=True))
    if is_read.get("mask") and not is_read["weights"]:
        raise ValueError(
            "make_train_step: `loss` must weight targets by `loss_weights(batch)` if `accumulate` "
            "is above 1, because a microbatch does not know the sum of the batch's mask; it reads "
            "only the mask."
        )


def _gradients_with_trace(
    loss: Partial, params: Any, batch: Mapping[str, Any], names: tuple[str, ...]
) -> tuple[tuple[Scalar, Metrics], Any, dict[str, Array]]:
    """Works as `_gradients` without accumulation, and also returns arrays of the forward pass."""

    def value(params, batch):
        loss_value, (metrics, trace) = loss.func.with_trace(
            *loss.args, params, batch, names
        )
        # The trace feeds the statistics and is not part of the loss.
        return loss_value, (metrics, jax.lax.stop_gradient(trace))

    grad = jax.value_and_grad(value, has_aux=True)
    (loss_value, (metrics, trace)), grads = grad(params, with_shares(batch, 1))
    return (loss_value, metrics), grads, trace


def with_shares(batch: Mapping[str, Any], accumulate: int) -> Mapping[str, Any]:
    """Returns a batch whose weights are the targets' shares of the loss, times `accumulate`."""
    weights = nan_where_all_zero(loss_weights(batch))
    # With this factor, the mean over microbatches is the sum over the batch.
    return with_weights(batch, weights * accumulate)


def loss_and_metrics(result: Any) -> tuple[Scalar, Metrics]:
    """Splits the result of a loss into its value and its metrics, which may be missing.

    Raises:
        TypeError: neither a scalar, nor a scalar and a mapping.
    """
    parts = result if isinstance(result, tuple) else (result, None)
    if len(parts) != 2:
        raise TypeError(
            "`loss` must return a scalar, or a scalar and a mapping of metrics; got a tuple of "
            f"{len(parts)}."
        )
    value, metrics = parts
    metrics = {} if metrics is None else metrics
    if np.shape(value) != () or not isinstance(metrics, Mapping):
        raise TypeError(
            "`loss` must return a scalar, or a scalar and a mapping of metrics; got "
            f"{_describe(value)} and {_describe(metrics)}."
        )
    return value, dict(metrics)


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"an array of shape {shape}"


def _value_and_grad(loss: Callable) -> Callable:
    """Makes the function that computes a loss, its metrics and its gradient."""
    return jax.value_and_grad(
        lambda params, batch: loss_and_metrics(loss(params, batch)), has_aux=True
    )


def _gradients(
    loss: Partial, params: Any, batch: Mapping[str, Any], accumulate: int
) -> tuple[tuple[Scalar, Metrics], Any]:
    """Computes the batch's loss, metrics and gradient, one microbatch after another."""
    _check_rows(batch, accumulate)
    batch = with_shares(batch, accumulate)
    if accumulate == 1:
        return _value_and_grad(loss)(params, batch)

    microbatches = cut_rows(batch, accumulate)
    of_microbatch = loss
    if hasattr(loss.func, "batch_totals"):
        totals = loss.func.batch_totals(*loss.args, microbatches)
        of_microbatch = functools.partial(loss, totals=totals)
    grad = _value_and_grad(of_microbatch)

    first = jax.tree.map(lambda array: array[0], microbatches)
    traced, shapes = jax.make_jaxpr(grad, return_shape=True)(params, first)
    _check_reads_weights(traced.jaxpr, first)

    def add(total, microbatch):
        return jax.tree.map(add_term, total, grad(params, microbatch)), None

    zeros = jax.tree.map(zero_sum, shapes)
    total, _ = jax.lax.scan(add, zeros, microbatches)
    results, gradients = jax.tree.map(lambda leaf: leaf / accumulate, total)
    # An optimizer gets gradients in the parameters' dtypes.
    gradients = jax.tree.map(
        lambda mean, leaf: mean.astype(leaf.dtype), gradients, shapes[1]
    )
    return results, gradients
