"""The optimizer of a run, from its settings."""

from collections.abc import Callable
from typing import Any

import optax

from rwkv7_jax.optim.optimizer import build_optimizer, learning_rate_schedule
from rwkv7_jax.runs.settings import OptimizerSettings


def make_optimizer(
    settings: OptimizerSettings, *, total_steps: int
) -> tuple[Callable[[Any], Any], optax.GradientTransformation]:
    """Makes the learning rate, as a function of the step, and the optimizer that follows it.

    Args:
        settings: the group of settings.
        total_steps: of the run; schedules that fall end there.

    Raises:
        ValueError: an unknown optimizer or schedule.
    """
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
