"""Makes the optimizer and the learning rate schedule of a run from its settings."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, Int

from rwkv7_jax.optim.optimizer import build_optimizer, learning_rate_schedule
from rwkv7_jax.runs.settings import OptimizerSettings
from rwkv7_jax.tuning.rate_search import FINAL_SHARE

# Maps the number of updates so far to the learning rate of the next one; for a stack, [K] to [K].
RateAt = Callable[[Any], Any]


def with_rate(settings: OptimizerSettings, rate: float) -> OptimizerSettings:
    """Returns the settings with a found learning rate as the peak."""
    return dataclasses.replace(
        settings, learning_rate=rate, final_learning_rate=FINAL_SHARE * rate
    )


def schedule_and_optimizer(
    settings: OptimizerSettings, *, total_steps: int
) -> tuple[RateAt, optax.GradientTransformation]:
    """Makes the learning rate schedule, by the number of updates, and the optimizer.

    Args:
        settings: settings of the optimizer, with learning rates.
        total_steps: number of updates, at which decaying schedules end.

    Raises:
        ValueError: the optimizer or the schedule is unknown.
    """
    assert settings.learning_rate is not None
    assert settings.final_learning_rate is not None
    learning_rate = learning_rate_schedule(
        settings.schedule,
        settings.learning_rate,
        settings.final_learning_rate,
        warmup_steps=settings.warmup_steps,
        total_steps=total_steps,
    )
    optimizer = build_optimizer(
        learning_rate,
        kind=settings.kind,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
    )
    return learning_rate, optimizer


def updates_made(opt_state: Any) -> Int[Array, "*K"]:
    """Finds the schedule's count of updates, which excludes skipped updates.

    Args:
        opt_state: state of the optimizer of `schedule_and_optimizer`, also wrapped by a mode; for a
            stack, with a leading axis K.
    """

    def is_count(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_count)
    return next(node.count for node in nodes if is_count(node))
