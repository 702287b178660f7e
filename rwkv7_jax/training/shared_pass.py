"""One forward pass for a loss and for the statistics that an optimizer wants with every update."""

import operator
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import Partial

from rwkv7_jax.model.rwkv7 import RWKV7


def describe_loss(
    loss: Callable, check: Callable, model: RWKV7, with_trace: Callable
) -> Callable:
    """Tells a train step about a loss, by attributes of the function.

    Args:
        loss: a function that is traced.
        check: looks at batches on the host, where ids can still be read.
        model: whose forward pass the loss is of.
        with_trace: the loss with a further argument, names of the model's trace, whose arrays it
            returns next to the metrics. Statistics are read from them; see `make_train_step`.
    """
    loss.check_batch = check  # pyright: ignore[reportFunctionMemberAccess]
    loss.model = model  # pyright: ignore[reportFunctionMemberAccess]
    loss.with_trace = with_trace  # pyright: ignore[reportFunctionMemberAccess]
    return loss


def describe_statistics(
    statistics: Callable, model: Any, names: tuple[str, ...], of_trace: Callable
) -> Callable:
    """Tells a train step how to read statistics from a loss's own forward pass.

    Args:
        statistics: a function that makes a forward pass of its own.
        model: whose pass it is.
        names: the arrays of the model's trace that are read.
        of_trace: the same function with the trace as a further argument, in place of the pass.
    """
    statistics.model = model  # pyright: ignore[reportFunctionMemberAccess]
    statistics.names = names  # pyright: ignore[reportFunctionMemberAccess]
    statistics.of_trace = of_trace  # pyright: ignore[reportFunctionMemberAccess]
    return statistics


def can_share_pass(loss: Partial, statistics: Partial | None, accumulate: int) -> bool:
    """Tells whether a loss's forward pass is the one from which the statistics are read.

    It is that of the same model with the same frozen arrays, which can be compared only before they
    are traced, and of all rows at once.
    """
    if statistics is None or accumulate > 1:
        return False
    if not (hasattr(loss.func, "with_trace") and hasattr(statistics.func, "of_trace")):
        return False
    ours = jax.tree.leaves(loss.args)
    theirs = jax.tree.leaves(statistics.args)
    same = len(ours) == len(theirs) and all(map(operator.is_, ours, theirs))
    return same and loss.func.model == statistics.func.model
