"""One forward pass for a loss and for the optimizer's statistics."""

import operator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from rwkv7_jax.array_types import Activations, Params
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.sharding import mesh_sizes, share_of_rows


@runtime_checkable
class LossWithTrace(Protocol):
    """A loss that can return intermediate values of its forward pass."""

    model: RWKV7

    def with_trace(self, *arguments: Any) -> Any:
        """Computes the loss; the last argument names arrays of the model's trace.

        Returns:
            The loss; a pair of its metrics and the named arrays.
        """
        ...


@runtime_checkable
class StatisticsOfTrace(Protocol):
    """Statistics that can be read from the forward pass of a loss.

    They read the arrays `names` of the model's trace, of the first `rows` rows of a batch.
    """

    model: RWKV7
    names: tuple[str, ...]
    rows: int

    def of_trace(self, *arguments: Any) -> Any:
        """Computes the statistics; the last argument holds the arrays of the trace."""
        ...


def hidden_of_batch(
    model: RWKV7,
    params: Params,
    start: RWKV7State,
    batch: Batch,
    names: tuple[str, ...],
) -> tuple[Activations, dict[str, Array]]:
    """Runs the model on the inputs of a batch, whose rows may hold several sequences.

    Args:
        model: the shell around `params`.
        params: all weights.
        start: the start state of every sequence.
        batch: the rows.
        names: of the model's trace.

    Returns:
        The normed activations before the head, and the arrays `names` of the trace.
    """
    outputs: Any = model.apply(
        {"params": params},
        jnp.asarray(batch.inputs),
        start,
        segment_ids=batch.segment_ids,
        method="hidden_with_trace",
        names=names,
    )
    x, _, trace = outputs
    return x, trace


def can_share_pass(loss: Partial, statistics: Partial | None, accumulate: int) -> bool:
    """Tells whether the statistics can be read from the loss's forward pass.

    They can if both use the same model and frozen arrays, and the batch is not split. The arrays
    can be compared only before they are traced.
    """
    if statistics is None or accumulate > 1:
        return False
    if not isinstance(loss.func, LossWithTrace):
        return False
    if not isinstance(statistics.func, StatisticsOfTrace):
        return False
    ours = jax.tree.leaves(loss.args)
    theirs = jax.tree.leaves(statistics.args)
    same = len(ours) == len(theirs) and all(map(operator.is_, ours, theirs))
    return same and loss.func.model == statistics.func.model


def reads_most_rows(statistics: Partial, rows: int) -> bool:
    """Tells whether statistics read at least half as many rows as a device computes.

    The shared pass keeps the arrays of all layers and of all of a device's rows until they are
    read. Of many rows they need more memory than the loss itself, while a separate pass over a few
    of them costs little time.

    Args:
        statistics: as in `can_share_pass`, which has returned True.
        rows: of the batch.
    """
    return 2 * statistics.func.rows >= share_of_rows(rows, mesh_sizes())
