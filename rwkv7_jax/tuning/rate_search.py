"""Finds a learning rate: tunes briefly at many rates in parallel and compares held-out losses.

No rate suits every model: published rates for start states lie between 1e-5 and 1. A state is
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

# The final rate of a schedule, as a fraction of the rate that was found.
FINAL_SHARE = 0.01

# With fewer steps, rates cannot be distinguished.
LEAST_STEPS = 12

# Gains within this relative distance of the best one count as equal to it.
_TOLERANCE = 0.03

# Gains within this relative distance are nearly equal: another seed or other rounding may reverse
# the order of their rates.
_NEARLY = 0.2


class SearchPlan(NamedTuple):
    """The size of a search.

    Attributes:
        steps: of every rate.
        rows: of a step, for every rate.
        share: the cost of the search as a fraction of the run's.
    """

    steps: int
    rows: int
    share: float


def plan_search(
    rates: int, *, steps: int, rows: int, share: float, measuring: float = 0.0
) -> SearchPlan:
    """Sizes a search so that it costs a given fraction of the run.

    Args:
        rates: the number of rates.
        steps: of the run.
        rows: of a step of the run.
        share: the fraction. A search has at least `LEAST_STEPS` steps, or as many as the run if
            that has fewer, even if it then costs more.
        measuring: cost of measuring one rate at the end, in rows of a step.
    """
    # All rates together have the rows of one step of the run: many small steps tell more about a
    # rate than a few large ones.
    own_rows = max(rows // rates, 1)
    budget = share * steps * rows / rates - measuring
    own_steps = max(int(budget / own_rows), min(LEAST_STEPS, steps))
    cost = rates * (own_steps * own_rows + measuring)
    return SearchPlan(own_steps, own_rows, cost / (steps * rows))


class RateChoice(NamedTuple):
    """The result of a search.

    Attributes:
        rate: the chosen rate; None if no rate is better than not tuning.
        base: the loss without tuning.
        losses: by rate.
        edge: "smallest" or "largest" if the chosen rate is at an end of the list, else "".
        near: the rates whose gains are equal or nearly equal to the best one, ascending.
        why: the reason for the choice, as the end of a sentence; "" without a rate.
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
    """Chooses the rate with the lowest held-out loss, or another one that is nearly as good.

    The first case that applies decides:

    1. Forgetting is measured: of the rates with equal gains, the one that forgets least.
    2. The model is worse than guessing: the smallest of the nearly equal rates. The gradients of
       all rows then agree that the model is overconfident, and large rates are best only in a short
       search.
    3. The next larger rate is nearly as good: that rate. A step of a search has fewer rows than one
       of the run, and noisy gradients favour small rates: Adam's best rate grows with the square
       root of the rows, so nine times the rows make half a decade.

    Args:
        base: the loss without tuning.
        losses: held-out loss of every rate, lower is better; non-finite if it diverged.
        forgetting: of every rate, the loss on text that must not be forgotten.
        guess: the held-out loss of guessing by the frequencies of tokens.
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
        chosen = min(equal, key=lambda rate: (_or_infinity(forgetting[rate]), rate))
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


def _or_infinity(loss: float) -> float:
    """Returns a loss, or infinity for NaN, which no comparison would order."""
    return math.inf if math.isnan(loss) else loss


def _within(gains: Mapping[float, float], share: float) -> tuple[float, ...]:
    """Returns the rates, ascending, whose gains are within a relative distance of the best."""
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
    """Finds the learning rate for any parameters: a start state, low-rank changes or all weights.

    Args:
        loss: of the parameters and a batch.
        tx: an optimizer whose learning rate peaks at 1.
        params: the initial parameters of every rate.
        batches: `steps` of them are read; each rate gets all rows.
        measure: maps parameters to their held-out loss, lower is better.
        steps: of every rate.
        rates: the rates to try.
        statistics: as in `make_train_step`.
        guess: as in `choose_rate`.

    Raises:
        ValueError: no rates, one that is not above 0, no steps, or too few batches.
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
    done = 0
    for batch in itertools.islice(batches, steps):
        train, _ = step(train, repeat_rows(batch, len(rates)))
        done += 1
    if done < steps:
        raise ValueError(
            f"find_rate: `batches` must hold a batch for each of {steps} steps; got {done}."
        )
    losses = {}
    for index, rate in enumerate(rates):
        losses[rate] = measure(params_of(train.params, index))
    return choose_rate(measure(params), losses, guess=guess)


def repeat_rows(batch: Any, times: int) -> Any:
    """Repeats all rows of a batch, once for each set of a stack."""
    return jax.tree.map(lambda rows: np.concatenate([rows] * times), batch)
