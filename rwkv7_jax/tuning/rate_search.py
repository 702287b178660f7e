"""Finds a learning rate: many are tried at once for a short while, and held-out text decides.

No rate is right for every model: published ones for start states lie between 1e-5 and 1. A state is
small, so copies of it are tuned as a stack, each at its own rate on the same rows.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from rwkv7_jax.checks import check_count, check_number, prefix_errors
from rwkv7_jax.training.losses import Loss
from rwkv7_jax.training.stacked_step import (
    create_stack,
    make_stacked_step,
    params_of,
    stack_params,
)

# From the smallest published rate that was measured on a model to the largest, by half decades.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)

# A found rate falls to this share of itself.
FINAL_SHARE = 0.01

# Below so many steps rates cannot be told from each other.
LEAST_STEPS = 12

# Gains this much smaller than the best one, as a share of it, count as equal to it.
_TOLERANCE = 0.03

# Gains this much smaller are nearly equal: another seed, or a program that rounds otherwise, may
# put their rates in another order.
_NEARLY = 0.2


class SearchPlan(NamedTuple):
    """The size of a search.

    Attributes:
        steps: of every rate.
        rows: of a step, for every rate.
        share: the search's arithmetic as a share of the run's.
    """

    steps: int
    rows: int
    share: float


def plan_search(
    rates: int, *, steps: int, rows: int, share: float, measuring: float = 0.0
) -> SearchPlan:
    """Sizes a search so that it costs a share of the run.

    Args:
        rates: how many are tried.
        steps: of the run.
        rows: of a step of the run.
        share: of the run's arithmetic. A search has `LEAST_STEPS` steps, or as many as the run if
            those are fewer, even where that costs more.
        measuring: what it costs to measure one rate at the end, in rows of a step.
    """
    # As many rows at a time as a step of the run has, shared by the rates: many small steps say
    # more about a rate than a few large ones.
    own_rows = max(rows // rates, 1)
    budget = share * steps * rows / rates - measuring
    own_steps = max(int(budget / own_rows), min(LEAST_STEPS, steps))
    cost = rates * (own_steps * own_rows + measuring)
    return SearchPlan(own_steps, own_rows, cost / (steps * rows))


class RateChoice(NamedTuple):
    """What a search found.

    Attributes:
        rate: the chosen one; None if no rate is better than not tuning at all.
        base: the loss without tuning.
        losses: by rate.
        edge: "smallest" or "largest" where the chosen rate is at an end of the list, else "".
        near: the rates whose gains are at least nearly as good as the best one, ascending.
        why: the reason for the choice, as the end of a sentence; "" where there is no rate.
    """

    rate: float | None
    base: float
    losses: dict[float, float]
    edge: str
    near: tuple[float, ...]
    why: str


def choose_rate(
    base: float,
    losses: Mapping[float, float],
    *,
    forgetting: Mapping[float, float] | None = None,
    guess: float | None = None,
) -> RateChoice:
    """Chooses the rate whose held-out loss is lowest, or another one that is nearly as good.

    A step of a search has fewer rows than one of the run, and noisy gradients favour small rates:
    those of Adam grow with the root of the rows, so nine times as many make half a decade. So the
    next larger rate is taken if it is nearly as good. Where the model is worse than guessing, the
    gradients of all rows say the same, that it is too sure, and large rates are best in a
    short search only: the smallest of the nearly equal ones is taken.

    Where it is measured what is forgotten, rates whose gains are as good as equal are told apart
    by that.

    Args:
        base: the loss without tuning.
        losses: of every rate on held-out text, lower is better; not finite where it diverged.
        forgetting: of every rate, the loss on text that must not be forgotten.
        guess: the loss on the same text of guessing by how often each token occurs.
    """
    gains = {rate: base - loss for rate, loss in losses.items() if math.isfinite(loss)}
    best = max(gains.values(), default=0.0)
    if not best > 0:
        return RateChoice(None, base, dict(losses), "", (), "")
    near = _within(gains, _NEARLY)
    lowest = max(gains, key=lambda rate: gains[rate])
    larger = min((rate for rate in losses if rate > lowest), default=lowest)
    chosen = lowest
    why = "its loss is the lowest"
    if forgetting is not None:
        equal = _within(gains, _TOLERANCE)
        chosen = min(equal, key=lambda rate: (forgetting[rate], rate))
        if len(equal) > 1:
            why = "of rates with equal gains it forgets least"
    elif guess is not None and base > guess:
        chosen = near[0]
        if len(near) > 1:
            why = (
                "it is the smallest of the nearly equal ones, and the untuned model is worse than "
                f"guessing by frequency ({guess:.4f})"
            )
    elif larger in near and larger != lowest:
        chosen = larger
        why = f"it is the next larger one than {lowest:g} and nearly as good"
    edge = ""
    if chosen == max(losses):
        edge = "largest"
    elif chosen == min(losses):
        edge = "smallest"
    return RateChoice(chosen, base, dict(losses), edge, near, why)


def _within(gains: Mapping[float, float], share: float) -> tuple[float, ...]:
    """Returns the rates, ascending, whose gains are smaller than the best by a share at most."""
    least = (1 - share) * max(gains.values())
    return tuple(sorted(rate for rate, gain in gains.items() if gain >= least))


def find_rate(
    loss: Loss,
    tx: optax.GradientTransformation,
    params: Any,
    batches: Iterable[Any],
    measure: Callable[[Any], float],
    *,
    steps: int,
    rates: Sequence[float] = RATES,
    statistics: Callable[[Any, Any], Any] | None = None,
    guess: float | None = None,
) -> RateChoice:
    """Finds the learning rate of any parameters: a start state, low-rank changes or all weights.

    Args:
        loss: of the parameters and a batch.
        tx: an optimizer whose learning rate peaks at 1.
        params: from which every rate starts.
        batches: `steps` of them are read; each rate gets all rows.
        measure: from parameters to their held-out loss, lower is better.
        steps: of every rate.
        rates: to try.
        statistics: as in `make_train_step`.
        guess: as in `choose_rate`.

    Raises:
        ValueError: no rates, one that is not above 0, or no steps.
    """
    with prefix_errors("find_rate"):
        check_count(steps, 1, "`steps`")
        rates = tuple(rates)
        if not rates:
            raise ValueError("`rates` must hold a number; got none.")
        for rate in rates:
            check_number(rate, 0, math.inf, "`rates`", above=True, bounds="positive")
    step = make_stacked_step(loss, tx, np.asarray(rates), statistics=statistics)
    train = create_stack(stack_params([params] * len(rates)), tx)
    for batch in itertools.islice(batches, steps):
        train, _ = step(train, repeat_rows(batch, len(rates)))
    losses = {}
    for index, rate in enumerate(rates):
        losses[rate] = measure(params_of(train.params, index))
    return choose_rate(measure(params), losses, guess=guess)


def repeat_rows(batch: Any, times: int) -> Any:
    """Repeats all rows of a batch, as they are for each set of a stack."""
    return jax.tree.map(lambda rows: np.concatenate([rows] * times), batch)
