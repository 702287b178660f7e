"""The optimizer of a run and the schedule that it follows, from the run's settings."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from rwkv7_jax.optim.optimizer import build_optimizer, learning_rate_schedule
from rwkv7_jax.runs.settings import OptimizerSettings
from rwkv7_jax.tuning.rate_search import FINAL_SHARE

# From how many updates were made to the learning rate of the next one; of a stack, [K] to [K].
RateAt = Callable[[Any], Any]


def with_rate(settings: OptimizerSettings, rate: float) -> OptimizerSettings:
    """Returns the settings in which a found rate is the highest one."""
    return dataclasses.replace(
        settings, learning_rate=rate, final_learning_rate=FINAL_SHARE * rate
    )


def schedule_and_optimizer(
    settings: OptimizerSettings, *, total_steps: int
) -> tuple[RateAt, optax.GradientTransformation]:
    """Makes the learning rate, by the updates made, and the optimizer that follows it.

    Args:
        settings: the group of settings, with its learning rates.
        total_steps: of the run; schedules that fall end there.

    Raises:
        ValueError: an unknown optimizer or schedule.
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


def copy_updates_made(opt_state: Any) -> Int[Array, "*K"]:
    """Copies the count of updates that the schedule has followed.

    It is not that of steps: an update that is left out takes its count back.

    Args:
        opt_state: of `schedule_and_optimizer`, with what a mode wraps around it; of a stack, with
            a leading axis K.
    """

    def is_count(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_count)
    # A copy, since steps donate what they are given.
    return jnp.copy(next(node.count for node in nodes if is_count(node)))
